"""launch/local.sh: what it runs, and one real pair of ranks that end with a user's error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "local.sh"


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """An interpreter that prints its threads and arguments, a line each, and ends with 75."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "threads $OMP_NUM_THREADS"\nprintf "%s\\n" "$@"\nexit 75\n')
    stub.chmod(0o755)
    return stub


def launch(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(
        ["bash", str(SCRIPT), *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**inherited, **environment},
    )


def test_syntax_and_mode() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["2", "demo", "run.name=a b", "~stages.long"], ["train", "demo", "run.name=a b", "~stages.long"]),
        (["2", "--resume", "runs/a b", "seed=1"], ["resume", "runs/a b", "seed=1"]),
    ],
    ids=["train", "resume"],
)
def test_what_is_run(argv: list[str], command: list[str], echo: Path) -> None:
    done = launch(*argv, PYTHON=str(echo), OMP_NUM_THREADS="3")
    head = ["threads 3", "-m", "steptron.launcher.torchrun", "--standalone", "--nproc-per-node", "2", "-m", "steptron"]
    assert done.stdout.splitlines() == head + command
    assert done.returncode == 75


@pytest.mark.parametrize("ranks", [1, 2, 1000])
def test_cores_are_shared_out(ranks: int, echo: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    done = launch(str(ranks), "demo", PYTHON=str(echo))
    assert done.stdout.splitlines()[0] == f"threads {max(1, cores // ranks)}"


@pytest.mark.parametrize("argv", [[], ["2"], ["0", "demo"], ["two", "demo"], ["2", "--resume"]], ids=" ".join)
def test_wrong_usage(argv: list[str]) -> None:
    done = launch(*argv)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: usage: launch/local.sh N RECIPE")


def test_two_ranks_report_a_bad_recipe_once() -> None:
    done = launch("2", "demo", "sed=1", PYTHON=sys.executable)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: sed: a recipe has no key 'sed'; nearest: seed\n"
