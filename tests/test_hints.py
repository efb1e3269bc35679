"""The packages that messages and pages tell people to install: no name of ours belongs to a stranger.

On PyPI, `apex`, `deep-ep` and `deep-gemm` are not NVIDIA's or DeepSeek's."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PLACES = ("steptron", "docs", "launch", "slurm", "recipes", "README.md", "CONTRIBUTING.md")
ELSEWHERE = {"s3fs"}
"""Packages that we name and do not depend on, each looked up by hand: s3fs is that of fsspec."""
STRANGERS = re.compile(r"(?:pip|uv|install|require)[^\n]*\b(?:apex|deep[-_]ep|deep[-_]gemm)\b", re.I)


def named(text: str) -> list[str]:
    """Return the requirements of each `pip install …`."""
    words = [word for line in re.findall(r"pip install ([^`\n,;)]*)", text) for word in re.split(r"[\s\"'),]+", line)]
    return [word for word in words if re.match(r"[A-Za-z][\w\-]*(\[|[=<>]|$)", word)]  # no options, no files


def test_every_package_that_is_named_is_one_that_we_know() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(one for extra in extras.values() for one in extra)]
    known = {Requirement(one).name.lower() for one in wanted} | ELSEWHERE
    files = [
        path for place in PLACES for path in ([ROOT / place] if (ROOT / place).is_file() else (ROOT / place).rglob("*"))
    ]
    seen: set[str] = set()
    for path in files:
        if path.suffix not in (".py", ".md", ".sh", ".yaml", "") or not path.is_file() or path.name == "log.md":
            continue
        text = path.read_text(errors="replace")
        assert not STRANGERS.search(text), path
        for word in named(text):
            name, _, extra = word.partition("[")
            seen.add(name)
            if name == "steptron":
                assert extra.rstrip("]") in {"", *extras}, f"{path}: {word}"
            else:
                assert re.split("[=<>]", name)[0].lower() in known, f"{path}: {word}"
    assert {"triton", "s3fs", "steptron"} <= seen, "the search finds what is there"


def test_a_strangers_package_would_be_found() -> None:
    assert named("apex is missing (pip install apex)") == ["apex"]
    assert STRANGERS.search("not installed: pip install -v deep-ep")
    assert STRANGERS.search("install deep_gemm")
