"""Exit codes, signals and restarts of the launcher, with real ranks: forks, but for one test whose processes are new
interpreters."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forks import Forked
from waiting import wait_until

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
rank, what, attempt = int(os.environ["RANK"]), sys.argv[1], os.environ["TORCHELASTIC_RESTART_COUNT"]
if what == "second-killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if what == "second-late":
    time.sleep(rank)
    Path(f"ended-{rank}").touch()
    sys.exit(75)
if "raise" in what:
    import atexit
    from steptron.launcher.leave import leave_with
    def bug():
        Path(f"at-{rank}").touch()
        while what.startswith("both") and not Path(f"at-{1 - rank}").exists():
            time.sleep(0.01)
        raise ValueError(f"a bug of rank {rank}" if what == "both-raise-otherwise" else "a bug")
    def the_other_has_raised():
        while not (Path(os.environ["STEPTRON_RAISED"]) / f"raised-{1 - rank}").exists():
            time.sleep(0.01)
    if what.startswith("both"):
        atexit.register(the_other_has_raised)
    if rank == 1 or what.startswith("both"):
        leave_with(bug)
if what.startswith("again-"):
    Path(f"attempt-{attempt}-rank-{rank}").touch()
    code = int(what.removeprefix("again-"))
    if rank == 1 or code in (3, 75):
        sys.exit(code)
if what == "answers":
    def answer(number, frame):
        time.sleep(rank)
        Path(f"ended-{rank}").write_text(signal.Signals(number).name)
        os._exit(75)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, answer)
if what == "ignores":
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
if what == "gloo":
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    if attempt == "0":
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10_000)
    value = torch.tensor(1.0)
    dist.all_reduce(value)
    Path(f"sum-{rank}").write_text(str(value.item()))
    os._exit(0)  # torch's threads may not outlive the interpreter
Path(f"up-{rank}").touch()
while what != "well":
    time.sleep(1)
"""

KILLED = f"error: rank 1 (host {socket.gethostname()}) was killed by SIGKILL; the machine may have run out of memory"


def start(what: str, folder: Path, *options: str, kind: type[subprocess.Popen] = Forked) -> subprocess.Popen[str]:
    script = folder / "rank.py"
    script.write_text(SCRIPT)
    return kind(
        [
            sys.executable,
            "-m",
            "steptron.launcher.torchrun",
            "--standalone",
            "--nproc-per-node",
            "2",
            *options,
            str(script),
            what,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
    )


def wait_for_both(folder: Path) -> None:
    wait_until(lambda: all((folder / f"up-{rank}").exists() for rank in (0, 1)), "both ranks")


@pytest.mark.parametrize(
    ("what", "code", "printed"),
    [
        ("well", 0, ""),
        ("second-killed", 137, f"{KILLED}\n"),
    ],
)
def test_the_first_failing_rank_gives_the_code(what: str, code: int, printed: str, tmp_path: Path) -> None:
    run = start(what, tmp_path, kind=subprocess.Popen)
    assert (*run.communicate(), run.returncode) == ("", printed, code)


@pytest.mark.parametrize(
    ("what", "speaker", "word", "more"),
    [
        ("second-raises", 1, "a bug", ""),
        ("both-raise", 0, "a bug", ""),
        ("both-raise-otherwise", 0, "a bug of rank 0", "[rank1]: ValueError: a bug of rank 1\n"),
    ],
)
def test_a_bug_is_shown_once(what: str, speaker: int, word: str, more: str, tmp_path: Path) -> None:
    run = start(what, tmp_path, "--max-restarts", "1")
    _, printed = run.communicate()
    assert run.returncode == 1
    first, second = printed.split("attempt 2: 2 ranks on 1 node\n")
    assert first == second
    assert first.endswith(f"\n[rank{speaker}]: ValueError: {word}\n{more}")
    lines = first.removesuffix(more).splitlines()
    assert lines[0] == f"[rank{speaker}]: Traceback (most recent call last):"
    assert all(line.startswith(f"[rank{speaker}]: ") for line in lines)
    assert first.count("Traceback") == 1


def test_ranks_that_stop_together_are_waited_for(tmp_path: Path) -> None:
    run = start("second-late", tmp_path)
    assert (*run.communicate(), run.returncode) == ("", "", 75)
    assert {path.name for path in tmp_path.glob("ended-*")} == {"ended-0", "ended-1"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_goes_to_all_ranks_which_are_waited_for(number: signal.Signals, tmp_path: Path) -> None:
    run = start("answers", tmp_path, "--max-restarts", "2")
    wait_for_both(tmp_path)
    run.send_signal(number)
    printed = run.communicate()
    assert [(tmp_path / f"ended-{rank}").read_text() for rank in (0, 1)] == [number.name] * 2
    assert (*printed, run.returncode) == ("", "", 75)


def test_a_second_sigint_ends_ranks_that_do_not(tmp_path: Path) -> None:
    run = start("ignores", tmp_path, "--max-restarts", "2")
    wait_for_both(tmp_path)
    run.send_signal(signal.SIGINT)
    time.sleep(1)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    run.communicate()
    assert run.returncode == 130


def test_a_signal_before_ranks_can_answer_stops_them(tmp_path: Path) -> None:
    run = start("sleeps", tmp_path, "--max-restarts", "2")
    wait_for_both(tmp_path)
    run.send_signal(signal.SIGUSR1)
    _, printed = run.communicate()
    assert run.returncode == 75, printed
    assert printed == ""


@pytest.mark.parametrize(("code", "attempts"), [(1, 3), (2, 1), (3, 1)])
def test_what_is_tried_again(code: int, attempts: int, tmp_path: Path) -> None:
    run = start(f"again-{code}", tmp_path, "--max-restarts", "2")
    _, printed = run.communicate()
    assert run.returncode == code
    assert len(list(tmp_path.glob("attempt-*-rank-1"))) == attempts
    assert printed == "".join(f"attempt {n}: 2 ranks on 1 node\n" for n in range(2, attempts + 1))


def test_the_second_attempt_meets_anew_on_gloo(tmp_path: Path) -> None:
    run = start("gloo", tmp_path, "--max-restarts", "1")
    _, printed = run.communicate()
    assert run.returncode == 0, printed
    assert printed.splitlines() == [
        KILLED,
        "attempt 2: 2 ranks on 1 node",
    ]
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in (0, 1)] == ["2.0", "2.0"]
