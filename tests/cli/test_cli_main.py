"""The command line itself: help, lazy imports, common options, errors in one line and on one rank."""

import platform
import re
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from steptron import __version__ as steptron_version
from steptron.cli import main as cli
from steptron.errors import DataError, SaveError, SignalStop, SteptronError

ROOT = Path(__file__).parents[2]


def steptron(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "steptron", *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


def test_help_names_every_command() -> None:
    done = steptron("--help")
    assert done.returncode == 0
    for command in cli.COMMANDS:
        assert f"    {command} " in done.stdout


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join)
def test_help_imports_nothing_but_the_standard_library(argv: list[str]) -> None:
    code = (
        "import sys\nbefore = set(sys.modules)\nfrom steptron.cli.main import main\n"
        f"try:\n    main({argv!r})\nexcept SystemExit as done:\n    assert not done.code\n"
        "imported = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "foreign = imported - sys.stdlib_module_names - {'steptron'}\n"
        "sys.exit(f'imported: {foreign}' if foreign else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--recipes DIR" in done.stdout
    assert "--traceback" in done.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_help_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: steptron {command}")


def test_version_is_one_line_that_imports_no_torch() -> None:
    code = (
        "import sys\nfrom steptron.cli.main import main\n"
        "try:\n    main(['--version'])\nexcept SystemExit as done:\n    assert not done.code\n"
        "sys.exit('torch is imported' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    versions = f"steptron {steptron_version}, torch {metadata.version('torch')}, Python {platform.python_version()}"
    assert done.stdout == versions + "\n"


def test_version_without_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert cli.versions() == f"steptron {steptron_version}, torch not installed, Python {platform.python_version()}"


def test_the_package_is_marked_as_typed() -> None:
    """Type checkers read annotations of an installed package only if it ships this file (PEP 561)."""
    assert (resources.files("steptron") / "py.typed").is_file()


@pytest.mark.parametrize(
    "argv",
    [
        ["--recipes", "mine", "train", "demo", "a=1", "~b", "+c=2"],
        ["train", "--recipes", "mine", "demo", "a=1", "~b", "+c=2"],
        ["train", "demo", "a=1", "--recipes=mine", "~b", "+c=2"],
        ["train", "demo", "a=1", "~b", "+c=2", "--recipes", "mine"],
    ],
    ids=["first", "after-the-command", "among-overrides", "last"],
)
def test_common_options_stand_anywhere(argv: list[str]) -> None:
    args = cli.parse(argv)
    assert (args.command, args.recipe, args.overrides) == ("train", "demo", ["a=1", "~b", "+c=2"])
    assert (args.recipes, args.traceback) == (Path("mine"), False)


@pytest.mark.parametrize(
    "words",
    ["--step 8 runs/a a=1 ~b", "runs/a --step 8 a=1 ~b", "runs/a a=1 --step 8 ~b", "runs/a a=1 ~b --step 8"],
)
def test_overrides_stand_on_either_side_of_an_option(words: str) -> None:
    args = cli.parse(["resume", *words.split()])
    assert (args.run_dir, args.step, args.overrides) == (Path("runs/a"), 8, ["a=1", "~b"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND; see `steptron --help`"),
        (["trian"], "steptron has no command 'trian'; nearest: train"),
        (["zzz"], "steptron has no command 'zzz'; known: train, resume, fork, show"),
        (["train"], "the following arguments are required: RECIPE; see `steptron train --help`"),
        (["resume"], "the following arguments are required: RUN_DIR; see `steptron resume --help`"),
        (["train", "demo", "--fast"], "unrecognized arguments: --fast; see `steptron --help`"),
        (["train", "demo", "--recipes"], "argument --recipes: expected one argument; see `steptron --help`"),
        (["train", "demo", "--trace"], "unrecognized arguments: --trace"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"), [(DataError("gone\n  for good"), 2), (SaveError("disk full"), 1)], ids=["data", "save"]
)
def test_an_error_is_one_line_and_its_exit_code(
    error: SteptronError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("steptron.cli.doctor.run", lambda args: _raise(error))
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"


def test_traceback_on_demand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("steptron.cli.doctor.run", lambda args: _raise(DataError("gone")))
    assert cli.main(["doctor", "--traceback"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("error: gone\n")


def test_what_is_no_users_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steptron.cli.doctor.run", lambda args: _raise(ValueError("ours")))
    with pytest.raises(ValueError, match="ours"):
        cli.main(["doctor"])


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steptron.cli.doctor.run", lambda args: _raise(KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 130


@pytest.mark.parametrize(
    ("environment", "local", "printed", "waited"),
    [
        ({}, False, "error: gone\n", 0),
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, False, "error: gone\n", 0),
        ({"RANK": "1"}, False, "", 0),
        ({"RANK": "9", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, False, "error on rank 9: gone\n", 5.5),
        ({"RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, True, "error on rank 1: gone\n", 0),
    ],
    ids=["alone", "rank-0", "rank-1", "rank-9-survives", "rank-local"],
)
def test_which_rank_speaks(
    environment: dict[str, str],
    local: bool,
    printed: str,
    waited: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    error = DataError("gone")
    if local:
        error.rank_local = True  # pyright: ignore[reportAttributeAccessIssue]
    cli.report(error, with_traceback=False)
    assert capsys.readouterr().err == printed
    assert sum(slept) == waited


def test_what_all_ranks_raise_is_left_to_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waited"))
    cli.report(SignalStop("saved"), with_traceback=False)
    assert capsys.readouterr().err == ""


def test_the_real_command_line_on_a_bad_recipe() -> None:
    done = steptron("train", "demo", "model.hiden_size=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: model.hiden_size: section model has no key 'hiden_size'; nearest: hidden_size\n"
    other = steptron("train", "demo", "model.hiden_size=3", RANK="1")
    assert (other.returncode, other.stdout, other.stderr) == (2, "", "")


def _raise(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize("version", ["2.10.1", "99.0.0+cu999"])
def test_a_torch_that_was_not_tried_is_named_once(
    version: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert cli.main(["export", "hf", "runs/none", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0] for line in lines if line.startswith("warning")] == [
        f"warning: torch {version} was not tried with steptron {steptron_version}"
    ]
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["export", "hf", "runs/none", "x"]) == 2
    assert "warning" not in capsys.readouterr().err


def test_a_torch_that_was_tried_is_not_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "hf", "runs/none", "x"]) == 2
    assert "warning" not in capsys.readouterr().err


def test_the_package_names_the_first_and_the_last_torch() -> None:
    (wanted,) = re.findall(r'"torch(>=[\d.]+,<[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert SpecifierSet(wanted).contains(metadata.version("torch"))
