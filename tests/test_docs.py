"""README and docs: links and files exist, commands parse, recipes resolve, the Python example runs."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from steptron.cli import main as cli
from steptron.cli import sweep
from steptron.config.resolve import resolve

from messages import unknown_keys
from small_runs import steptron, write_recipe
from tiny import tiny_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LOG = ROOT / "docs" / "log.md"
"""The log tells what was true at its dates; its links and commands are not checked."""
CHECKED = [page for page in PAGES if page != LOG]

PLACEHOLDERS = {"RECIPE": "demo", "RUN_DIR": "runs/demo", "NAME": "name", "DIR": "folder", "OUT": "out", "COPY": "copy"}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", CHECKED, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target}: there is no such file"
        if anchor:
            assert anchor in _anchors(linked), f"{target}: there is no such heading"


@pytest.mark.parametrize("page", CHECKED, ids=named)
def test_files_that_a_page_names_exist(page: Path) -> None:
    names = r"`((?:steptron|tests|benchmarks|launch|slurm|recipes|docs)/[\w./-]+\.(?:py|sh|sbatch|yaml|md))`"
    for name in re.findall(names, page.read_text()):
        if "PACKAGE" in name:
            continue  # a pattern of names
        assert (ROOT / name).is_file(), f"{name}: there is no such file"


@pytest.mark.parametrize("page", CHECKED, ids=named)
def test_commands_that_a_page_names_parse(page: Path) -> None:
    for command in _commands(page.read_text()):
        try:
            args = cli.parse([PLACEHOLDERS.get(word, word) for word in command])
        except cli.UsageError as error:
            if "are required" in str(error):
                continue  # a sentence may name a command without its arguments
            pytest.fail(f"{shlex.join(command)}: {error}")
        overrides = getattr(args, "overrides", [])
        if args.command == "sweep":
            assert sweep.plan(args.recipe, overrides, None)
            continue
        if getattr(args, "recipe", None) == "demo":
            resolve("demo", [word for word in overrides if "…" not in word])
        for key in (word.lstrip("+~").partition("=")[0] for word in overrides):
            if not key.startswith(("model", "stages", "optim", "monitor", "parallel")) or "." in key:
                assert not unknown_keys(f"{key}=1"), f"{shlex.join(command)}: {key} is no key of the recipe"


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in CHECKED:
        if page.parent == ROOT / "docs" and page.name != "README.md":
            assert f"]({page.name})" in index, f"docs/README.md does not link {page.name}"


def test_lines_of_prose_are_short() -> None:
    """Tables, links and code may be longer; the generated reference is a table."""
    for page in CHECKED:
        for number, line in enumerate(_prose(page.read_text()), start=1):
            assert len(line) <= 120, f"{named(page)}: {number}. line of prose has {len(line)} characters: {line}"


def test_the_recipe_of_the_data_page_resolves(tmp_path: Path) -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    recipe = resolve(str(tmp_path / "mine.yaml"))
    written = yaml.safe_load(text)
    assert recipe.run.name == written["run"]["name"]
    assert set(recipe.data.sources) == set(written["data"]["sources"]) == set(recipe.stages["base"].mix)


def test_the_python_example_generates_from_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("def main(): return sum(range(10)) / 3\n" * 200)
    for name in ("prose", "code"):
        words = ("--out", tmp_path / "corpus", "--name", name, "--vocab-size", 262)
        steptron("data", "build", tmp_path / "text.txt", *words)
    recipe = tiny_recipe(tmp_path / "corpus", tmp_path / "runs" / "mine")
    steptron("train", write_recipe(recipe, tmp_path / "mine.yaml"), "stages.base.tokens=512", "~stages.long")
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "using.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(code, "docs/using.md", "exec"), {})
    assert capsys.readouterr().out.startswith("def main(")


@cache
def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}


def _commands(text: str) -> Iterator[list[str]]:
    """Yield the words after `steptron` of every command in a code block or in backticks, comments left out."""
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"(?<!`)`(steptron [^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in lines:
        found = re.match(r"(?:\.venv/bin/|.* -m )?steptron (.*)", line.strip())
        if not found or "|" in found[1] or "·" in found[1] or "…" in found[1] or "[" in found[1].split("=")[0]:
            continue  # a pattern of a command, not a command
        words = shlex.split(found[1], comments=True)
        if words and not words[0].startswith("-") and len(words) > 1:
            yield words


def _prose(text: str) -> Iterator[str]:
    """Yield the lines that are neither table, code, image nor comment."""
    code = False
    for line in text.splitlines():
        if line.startswith("```"):
            code = not code
        elif not code and not line.startswith(("|", "    ", "![", "<!--")):
            yield line
