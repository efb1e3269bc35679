"""Forks in place of new interpreters: what a command sees is what a new interpreter would see, and nothing is left for
the next."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from forks import Forked, run
from ranks import run_ranks
from waiting import wait_until

LOOK = """
import json, os, signal, sys, threading
from pathlib import Path

def entry(name):
    return Path(f"/proc/self/{name}").read_text().rstrip("\\0").split("\\0")

print(json.dumps({
    "argv": sys.argv, "path": sys.path, "name": __name__, "main": sys.modules["__main__"].__dict__ is globals(),
    "folder": os.getcwd(), "environment": dict(os.environ), "parent": os.getppid(), "leader": os.getsid(0) == os.getpid(),
    "cmdline": entry("cmdline"), "environ": sorted(entry("environ")), "threads": threading.active_count(),
    "handlers": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)],
    "input": sys.stdin.read(), "open": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:3],
}))
print("an error", file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture(autouse=True)
def interrupts():
    """Interrupts count here, and so in new interpreters, also where the shell that started pytest in the background
    ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def started(kind: type[subprocess.Popen], words: list[str], folder: Path) -> tuple[dict, str, int]:
    """What a command sees, writes to stderr, and exits with."""
    process = kind(
        [sys.executable, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder / "more"), "LANG": "C.UTF-8", "COLOUR": "blue green"},
        start_new_session=True,
    )
    out, err = process.communicate("a line")
    return json.loads(out), err, process.returncode


@pytest.mark.parametrize("how", ["-c", "-m", "script", "-u -m"])
def test_a_fork_sees_what_a_new_interpreter_sees(tmp_path: Path, how: str):
    (tmp_path / "look.py").write_text(LOOK)
    words = {"-c": ["-c", LOOK], "-m": ["-m", "look"], "-u -m": ["-u", "-m", "look"], "script": ["look.py"]}[how]
    words += ["one", "two words", ""]
    wanted, got = (started(kind, words, tmp_path) for kind in (subprocess.Popen, Forked))
    assert got == wanted
    assert got[1:] == ("an error\n", 7)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda sent: sent.name)
def test_a_signal_ends_a_fork_as_it_ends_a_new_interpreter(tmp_path: Path, sent: signal.Signals):
    code = "import pathlib, time; pathlib.Path('up').touch(); time.sleep(1000)"
    process = Forked([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_until((tmp_path / "up").exists, "its start", [process])
    process.send_signal(sent)
    assert process.wait() == -sent


def test_the_server_of_a_process_and_its_launchers_end_with_it(tmp_path: Path):
    """Killed, so that nothing could be told to end."""
    (tmp_path / "rank.py").write_text(
        "import os, time; from pathlib import Path\n"
        "Path(f'rank-{os.environ[\"RANK\"]}').write_text(f'{os.getpid()} {os.getppid()}')\ntime.sleep(1000)"
    )
    code = (
        "import sys; from forks import Forked\n"
        "words = ['-m', 'steptron.launcher.torchrun', '--standalone', '--nproc-per-node', '2', 'rank.py']\n"
        "Forked([sys.executable, *words], start_new_session=True).wait()"
    )
    paths = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths})
    files = [tmp_path / f"rank-{rank}" for rank in (0, 1)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files), "both ranks", [process])
    ranks, parents = zip(*(map(int, file.read_text().split()) for file in files), strict=True)
    (launcher,) = set(parents)
    assert parent_of(launcher) == process.pid
    servers = children_of(process.pid) - {launcher} | children_of(launcher) - set(ranks)
    assert len(servers) == 2
    process.kill()
    process.wait()
    os.kill(launcher, signal.SIGKILL)
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{server}").exists() for server in servers), "the end of both servers")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children_of(pid: int) -> set[int]:
    words = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return {int(word) for word in words}


def test_warnings_are_shown_where_the_environment_asks_for_them(tmp_path: Path):
    code = "import warnings; warnings.warn('old', DeprecationWarning, stacklevel=1); import sys; sys.exit(0)"
    words = [sys.executable, "-c", f"exec(compile({code!r}, 'elsewhere.py', 'exec'), {{'__name__': 'elsewhere'}})"]
    assert run(words).stderr == ""
    assert "DeprecationWarning: old" in run(words, env={**os.environ, "PYTHONWARNINGS": "default"}).stderr


def leave_all_behind(rank: int) -> None:
    """Change whatever a process has that another could notice."""
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.manual_seed(5)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.modules["steptron"].left_behind = True  # pyright: ignore[reportAttributeAccessIssue]


def environment() -> dict[str, str]:
    """Variables but those of a rank. DeepSpeed leaves one of these in a process that has trained alone."""
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def look_around(rank: int) -> dict:
    """What `leave_all_behind` would have changed, and what of it the process before could have kept."""
    total = torch.ones(1)
    dist.all_reduce(total)
    return {
        "sum": total.item(),
        "environment": environment(),
        "folder": os.getcwd(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": str(torch.get_default_device()),
        "seed": torch.initial_seed(),
        "handler": signal.getsignal(signal.SIGTERM),
        "modules": hasattr(sys.modules["steptron"], "left_behind"),
        "group": dist.get_world_size(),
    }


def raise_on_one(rank: int) -> None:
    """Rank 0 waits in a collective for one that has failed."""
    if rank == 1:
        raise ValueError("a fault of rank 1")
    dist.all_reduce(torch.ones(1))


def kill_one(rank: int) -> None:
    """Rank 0 waits in a collective for one that is gone."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
    dist.barrier()


@pytest.mark.parametrize("before", ["nothing", "left behind", "raised", "killed"])
def test_ranks_find_nothing_of_those_before(tmp_path: Path, before: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OF_THIS_TEST", before)
    if before == "left behind":
        run_ranks(2, leave_all_behind, tmp_path)
    if before == "raised":
        with pytest.raises(AssertionError, match=r"ValueError: a fault of rank 1"):
            run_ranks(2, raise_on_one, tmp_path)
    if before == "killed":
        with pytest.raises(
            AssertionError, match=r"a rank died without an answer: .*-9|rank 0 failed:\n(.*\n)*.*by peer"
        ):
            run_ranks(2, kill_one, tmp_path)
    alone = {
        "sum": 2.0,
        "environment": environment(),
        "folder": os.getcwd(),
        "threads": 1,
        "dtype": torch.float32,
        "device": "cpu",
        "handler": signal.SIG_DFL,
        "modules": False,
        "group": 2,
    }
    found = run_ranks(2, look_around, tmp_path)
    assert len({5} | {rank.pop("seed") for rank in found}) == 3, (
        "where nothing sets a seed, ranks draw different numbers"
    )
    assert found == [alone, alone]


def where_it_is(rank: int, folder: Path) -> None:
    """Rank 0 hangs in a collective that rank 1, which fails once it knows, never joins."""
    (folder / f"rank-{rank}").write_text(str(os.getpid()))
    if rank == 1:
        wait_until(lambda: (folder / "rank-0").exists() and (folder / "rank-0").read_text(), "rank 0")
        raise ValueError("enough")
    dist.all_reduce(torch.ones(1))
    signal.pause()


def test_a_rank_that_hangs_is_ended_with_the_one_that_failed(tmp_path: Path):
    with pytest.raises(AssertionError, match=r"enough|by peer"):
        run_ranks(2, where_it_is, tmp_path, tmp_path)
    pid = int((tmp_path / "rank-0").read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the end of rank 0")
