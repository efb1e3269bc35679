"""Ranks that are stopped, killed, stuck or wrong in the middle of a real run: what the launcher prints, returns, and
when."""

import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from steptron.config.schema import CheckpointConfig, Recipe

from forks import Forked
from messages import without_warnings
from small_runs import build_corpus, command, ledger, metrics, write_recipe
from tiny import tiny_recipe
from waiting import wait_until

TIMEOUT_S = 10.0
"""Long enough for forked ranks on busy cores to find each other."""

PATCHED = """
import os, sys, time
import steptron.train.loop as loop
from steptron.launcher.leave import leave_with
from steptron.cli.main import main
from steptron.errors import DataError

train_step, steps, what = loop.train_step, 0, sys.argv.pop()

def patched(*args):
    global steps
    steps += 1
    if steps == 4 and os.environ["RANK"] == "1":
        if what == "sleeps":
            time.sleep(1000)
        raise ValueError("a bug") if what == "bug" else DataError("a shard has gone")
    return train_step(*args)

loop.train_step = patched
leave_with(lambda: main(sys.argv[1:]))
"""


pytestmark = pytest.mark.takes(50)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with tokenizer.json and the sources `prose` and `code`, the same text."""
    return build_corpus(tmp_path_factory.mktemp("corpus"))


def endless(corpus: Path, run_dir: Path, ranks: int, timeout_s: float) -> Recipe:
    """Thousands of steps, with sizes that two and three ranks divide."""
    recipe = tiny_recipe(corpus, run_dir, checkpoint=CheckpointConfig(every=100_000))
    base = recipe.stages["base"]
    stages = {
        "base": replace(
            base, tokens=10**7, batch_size=6, micro_batch=6 // ranks, balance=replace(base.balance, num_groups=ranks)
        )
    }
    model = replace(recipe.model, num_layers=2, moe=replace(recipe.model.moe, num_experts=6))
    return replace(recipe, model=model, run=replace(recipe.run, timeout_s=timeout_s), stages=stages)


def start(
    corpus: Path, folder: Path, script: str = "", what: str = "", ranks: int = 2, timeout_s: float = TIMEOUT_S
) -> subprocess.Popen:
    """A run, or a script in place of the command with one argument more."""
    recipe = write_recipe(endless(corpus, folder / "run", ranks, timeout_s), folder / "tiny.yaml")
    words = command("train", recipe, ranks=ranks)
    if script:
        (folder / "patched.py").write_text(script)
        words[words.index("steptron") - 1 : words.index("steptron") + 1] = [str(folder / "patched.py")]
        words.append(what)
    return Forked(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def pid_of(rank: int, folder: Path) -> int:
    """Process of a rank, found by its environment: the launcher gives every rank a session of its own."""
    for process in Path("/proc").iterdir():
        try:
            words, variables = (process / "cmdline").read_bytes(), (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder / "tiny.yaml").encode() in words and f"RANK={rank}".encode() in variables:
            return int(process.name)
    raise AssertionError(f"no process of rank {rank}")


def signal_in_the_middle(run: subprocess.Popen, folder: Path, rank: int, sent: signal.Signals) -> int:
    """Send a signal to a rank after some steps; its process."""
    written = folder / "run" / "metrics.jsonl"
    wait_until(lambda: written.exists() and written.read_text().count("\n") >= 5, "step 5", [run])
    pid = pid_of(rank, folder)
    os.kill(pid, sent)
    return pid


def test_a_stopped_rank_is_named_by_the_one_left(corpus: Path, tmp_path: Path) -> None:
    run = start(corpus, tmp_path)
    stopped = signal_in_the_middle(run, tmp_path, 0, signal.SIGSTOP)
    since = time.monotonic()
    printed = next(filter(without_warnings, run.stderr))
    seconds = time.monotonic() - since
    os.kill(stopped, signal.SIGCONT)  # else the agent waits 30 s for it to obey
    assert run.communicate()[1] == ""
    done = len(metrics(tmp_path / "run"))
    found = re.fullmatch(
        rf"error: step (\d+): (\w+) in \w+ \([\w/]+\.py\) did not end within {TIMEOUT_S:g} s: "
        rf"rank 0 \(host {socket.gethostname()}\) was last heard of in step (\d+), [\w ]+\n",
        printed,
    )
    assert found, printed
    assert abs(int(found[1]) - done) <= 1
    assert abs(int(found[3]) - done) <= 1
    assert re.search("all_|reduce_|broadcast|barrier", found[2]), "no collective"
    assert run.returncode == 1
    assert seconds > TIMEOUT_S - 1


def test_a_killed_rank_ends_the_run_without_a_timeout(corpus: Path, tmp_path: Path) -> None:
    run = start(corpus, tmp_path, timeout_s=100_000.0)
    signal_in_the_middle(run, tmp_path, 1, signal.SIGKILL)
    printed = without_warnings(run.communicate()[1])
    done = len(metrics(tmp_path / "run"))
    found = re.fullmatch(
        rf"error: rank 1 \(host {socket.gethostname()}\) was killed by SIGKILL in step (\d+), [\w ]+; the machine may have run out of "
        r"memory\n",
        printed,
    )
    assert found, printed
    assert abs(int(found[1]) - done) <= 1
    assert run.returncode == 128 + signal.SIGKILL


def test_ranks_whose_launcher_is_killed_save_and_end(corpus: Path, tmp_path: Path) -> None:
    run = start(corpus, tmp_path)
    signal_in_the_middle(run, tmp_path, 0, signal.SIGCONT)
    ranks = [Path("/proc") / str(pid_of(rank, tmp_path)) for rank in (0, 1)]
    run.kill()
    wait_until(lambda: not any(rank.exists() for rank in ranks), "the end of both ranks")
    done = len(metrics(tmp_path / "run"))
    assert ledger(tmp_path / "run")[-1]["reason"].startswith(f"SIGTERM: saved at step {done};")
    run.communicate()


def test_of_two_ranks_one_names_the_third_and_the_place_it_is_stuck_in(corpus: Path, tmp_path: Path) -> None:
    run = start(corpus, tmp_path, PATCHED, "sleeps", ranks=3)
    printed = without_warnings(run.communicate()[1])
    reason = (
        f"step 4: all_gather_single in train (parallel/network.py) did not end within {TIMEOUT_S:g} s: "
        f"rank 1 (host {socket.gethostname()}) is in step 4, training step, still in patched (patched.py:15), "
        "called from run_step (train/loop.py)"
    )
    assert printed == f"error: {reason}\n"
    assert run.returncode == 1
    assert ledger(tmp_path / "run")[-1]["reason"] == reason


@pytest.mark.parametrize(
    ("what", "code", "last"),
    [("bug", 1, "[rank1]: ValueError: a bug\n"), ("data", 2, "error on rank 1: a shard has gone\n")],
)
def test_an_error_on_one_rank_is_shown_once(corpus: Path, tmp_path: Path, what: str, code: int, last: str) -> None:
    run = start(corpus, tmp_path, PATCHED, what)
    printed = without_warnings(run.communicate()[1])
    assert printed.endswith(last)
    assert printed.count(last) == 1
    others = [line for line in printed.splitlines() if not line.startswith("[rank1]")]
    assert others == ([] if what == "bug" else [last.rstrip()])
    assert run.returncode == code
