"""Python commands forked from a server that has imported everything; a new interpreter takes 4 s of CPU to do so.

    test     ─ Forked([python, -m, steptron, …]) ─► server of the test ───── fork ─ fork ─► the command, a child of the test
    launcher ─ Forked([python, -m, steptron, …]) ─► server of the launcher ─ fork ─ fork ─► a rank, a child of the launcher
    a job ── PYTHON=write_interpreter(…) -m LAUNCHER ─► a new interpreter that imports everything ─► its ranks, as above

The command has its own arguments, environment, directory, streams and session, its own entries in /proc, and the
parent, exit code and signals that it would have had as a new interpreter. What it shares with its siblings: the seed of
`hash`, and what modules read of the environment while they were imported. A test whose subject is one of these, or a
warning at import, starts an interpreter of its own.

A server forks only while it has no threads but those of libraries that expect forks (jemalloc), and does nothing but
import and fork."""

import ctypes
import gc
import importlib
import io
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

LAUNCHER = "steptron.launcher.torchrun"
"""The module whose child processes are ranks."""

IMPORTED = (
    *(
        "steptron.train.start",
        "steptron.cli.train",
        "steptron.cli.resume",
        "steptron.cli.doctor",
        "steptron.prove.spawn",
    ),
    *(
        "torch.distributed.run",
        "torch.profiler",
        "pyarrow.parquet",
        "pandas",
        "pyarrow.pandas_compat",
        "dateutil.parser",
    ),
)
"""All that commands import sooner or later, but for the modules that are run as `-m`."""

ROOM = 1 << 14
"""Bytes in the server's arguments and in its environment, which those of commands overwrite."""

PR_SET_CHILD_SUBREAPER = 36

RELAYED = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that mean ranks, and not the server of a launcher, which ends with the launcher."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What an interpreter would be started with; `words` begin with its own name."""

    words: list[str]
    environment: dict[str, str]
    folder: str
    new_session: bool


class Server:
    """A process of which `fork` makes children of this one; it ends with this one."""

    def __init__(self, connection: socket.socket):
        self._connection = connection

    def fork(self, command: Command, streams: list[int]) -> int:
        """Run the command with these standard streams. Returns its process number."""
        _adopt_orphans(True)  # what the server's child forks, and leaves, is this process's child
        try:
            socket.send_fds(self._connection, [pickle.dumps(command)], streams)
            answer = self._connection.recv(64)
        finally:
            _adopt_orphans(False)
        assert answer, "the server of forks has ended"
        return int(answer)


@cache
def server() -> Server:
    """The server of this process, started at the first call."""
    ours, theirs = _socket_pair()
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import forks; forks.main({theirs.fileno()})"
    )
    subprocess.Popen(
        [sys.executable, "-c", code, "-" * ROOM],
        pass_fds=[theirs.fileno()],
        env={**os.environ, "STEPTRON_TEST_ROOM": "-" * ROOM, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    theirs.close()
    return Server(ours)


class Forked(subprocess.Popen):
    """`subprocess.Popen` of a command of this interpreter, `[sys.executable, …]`, without a new interpreter."""

    server = staticmethod(server)

    def _execute_child(
        self, args: Sequence[Any], *options: Any
    ) -> None:  # the one method of Popen that makes a process
        (_, preexec, _, pass_fds, folder, environment, _, _, shell), pipes = options[:9], options[9:15]
        assert args[0] == sys.executable, f"{args[0]} is not this interpreter"
        assert not any((preexec, pass_fds, shell)), "a fork takes none of preexec_fn, pass_fds and shell"
        command = Command(
            words=[str(word) for word in args],
            environment=dict(os.environ if environment is None else environment),
            folder=str(folder or Path.cwd()),
            new_session=bool(options[20]),
        )
        streams = [own if given == -1 else given for own, given in enumerate((pipes[0], pipes[3], pipes[5]))]
        try:
            self.pid = self.server().fork(command, streams)
        finally:
            self._close_pipe_fds(*pipes)  # pyright: ignore[reportAttributeAccessIssue]
        self._child_created = True


def run(words: Sequence[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end as a fork, as `subprocess.run` does with its output captured as text."""
    with Forked(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def main(connection: int) -> None:
    """A server's process: import, and fork commands until the other side of the connection has ended."""
    # The first is this file's folder, the second "", of -c.
    base = [path for path in sys.path[2:] if path not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    _import_everything()
    command = _serve(socket.socket(fileno=connection))
    if LAUNCHER in command.words:
        command = _fork_ranks() or command
    _become(command, base)
    _run(command.words[1:])


def write_interpreter(path: Path) -> Path:
    """Write a program that does what this interpreter does with the same words, but has a launcher fork its ranks.

    It is for commands that start the launcher themselves, such as the job of a scheduler."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import forks; forks.launch(sys.argv)"
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(0o755)
    return path


def launch(words: list[str]) -> None:
    """Run these words as the program of `write_interpreter` does: a launcher forks its ranks."""
    # The first is this file's folder, the second that of the program.
    base = [path for path in sys.path[2:] if path not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    rank = None
    if LAUNCHER in words:
        _import_everything()
        rank = _fork_ranks()
    if rank is not None:
        _become(rank, base)
    _run((rank.words if rank else words)[1:])


def reseed() -> None:
    """Give this fork random numbers of its own, as a new interpreter has, where nothing sets a seed."""
    import numpy as np
    import torch

    np.random.seed()
    torch.seed()


def _import_everything() -> None:
    gc.disable()  # imports make 600,000 objects and hardly any garbage
    for module in IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection would touch, and so copy, each page of a fork
    gc.enable()


def _fork_ranks() -> Command | None:
    """Make the launcher that this process becomes start its ranks as forks. Return None in the launcher, and in each rank
    its command."""
    ours, theirs = _socket_pair()
    if os.fork():
        theirs.close()
        _ranks_come_from(Server(ours))
        return None
    os.setsid()
    ours.close()
    for number in RELAYED:  # a scheduler sends them to all that a task has started
        signal.signal(number, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    return _serve(theirs)


def _serve(connection: socket.socket) -> Command:
    """Fork commands; returns in each of them what it is to do, and never in the server."""
    while True:
        message, fds, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            os._exit(0)
        command: Command = pickle.loads(message)
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.0002)
            connection.send(str(os.getpid()).encode())
            connection.close()
            for stream, fd in enumerate(fds):
                os.dup2(fd, stream)
                os.close(fd)
            return command
        for fd in fds:
            os.close(fd)
        os.waitpid(between, 0)


def _become(command: Command, base: list[str]) -> None:
    """Put on what the command is to be: session, directory, environment, path, warnings, threads, seeds, entries in
    /proc."""
    import torch

    if command.new_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in RELAYED:
        signal.signal(number, signal.SIG_DFL)
    os.chdir(command.folder)
    os.environ.clear()
    os.environ.update(command.environment)
    time.tzset()
    sys.path[:] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path] + base
    for rule in filter(None, os.environ.get("PYTHONWARNINGS", "").split(",")):
        warnings._setoption(rule)  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    reseed()
    _overwrite_proc(command)


def _overwrite_proc(command: Command) -> None:
    """Write arguments and environment where /proc/PID/cmdline and environ have them; `os.environ` is elsewhere once it
    was set anew."""
    numbers = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end, env_start, env_end = (int(number) for number in numbers[45:49])
    variables = [f"{name}={value}" for name, value in command.environment.items()]
    for first, last, words in ((start, end, command.words), (env_start, env_end, variables)):
        text = b"".join(os.fsencode(word) + b"\0" for word in words)[: last - first - 1]
        ctypes.memset(first, 0, last - first)
        ctypes.memmove(first, text, len(text))


def _stream(fd: int, unbuffered: bool) -> io.TextIOWrapper:
    """Return what an interpreter has as standard output (fd 1) or standard error (fd 2)."""
    file = os.fdopen(fd, "wb", closefd=False)
    errors = "strict" if fd == 1 else "backslashreplace"
    return io.TextIOWrapper(file, "utf-8", errors, line_buffering=fd == 2, write_through=unbuffered)


def _run(words: list[str]) -> None:
    """Do what `python WORDS…` does."""
    unbuffered = words[0] == "-u"
    words = words[1:] if unbuffered else words
    # The server's own streams believe that they can seek, as they could before a pipe took their place.
    sys.stdout, sys.stderr = (_stream(fd, unbuffered) for fd in (1, 2))
    first, *rest = words
    if first == "-m":
        sys.path.insert(0, str(Path.cwd()))
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = module = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    else:
        assert not first.startswith("-"), f"the option {first} is not known here"
        sys.path.insert(0, str(Path(first).resolve().parent))
        sys.argv = words
        runpy.run_path(first, run_name="__main__")


def _ranks_come_from(made: Server) -> None:
    """Have torch's launcher in this process start its ranks as forks."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    class Rank(Forked):
        server = staticmethod(lambda: made)

    subprocess_handler.Popen = Rank  # pyright: ignore[reportPrivateImportUsage]


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _adopt_orphans(wanted: bool) -> None:
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0) == 0
