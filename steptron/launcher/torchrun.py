"""`python -m steptron.launcher.torchrun …`: torchrun with the exit codes, signals and restarts that long runs need.

    SIGTERM SIGUSR1 SIGINT ──► every rank of this node; the launcher waits until they have saved and ended
    a rank ends ──► 0: wait for the others · 3, 75, 76: all ranks end with it, wait · any other code: kill the others
    attempt over ─► 2, 3, 75, 76, or after a signal: the end · else the next attempt, while --max-restarts lasts
    the end ─► 76 with --standalone: as many ranks as the coming stage needs, with `steptron resume`

torchrun itself exits with 1 whatever the exit code of its ranks was, prints pages of its own log and traceback, kills
ranks 30 s after a signal, and gives a second attempt the addresses of the first. A scheduler needs the code (75:
requeue), and a person needs the one line that the failing rank has printed. A rank that was killed by a signal could
not print one, so the launcher prints it, with the step of that rank. The launcher also prints tracebacks, and prints a
bug that all ranks meet once.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from types import FrameType
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousInfo,
    RendezvousTimeoutError,
)
from torch.distributed.launcher import api as launcher

from steptron.errors import OtherRanks, PolicyStop, SignalStop
from steptron.launcher.leave import RAISED_VARIABLE, leave_with
from steptron.launcher.other_ranks import CORES_VARIABLE, NEXT_VARIABLE, Next, read_next
from steptron.parallel.flight_record import flight_record
from steptron.parallel.rank_status import FOLDER_VARIABLE, read_status

STOPPED = SignalStop.exit_code
"""The exit code of ranks that stopped on a signal after saving. It asks the scheduler to start the job again."""

TOGETHER = (PolicyStop.exit_code, STOPPED, OtherRanks.exit_code)
"""The exit codes that all ranks reach, each in its own time. Rank 0 may still write reports after the others have gone.
"""

FINAL = (2, *TOGETHER)
"""The exit codes that end the job: another attempt would repeat a user's error, or the end was intended."""

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

END_S = 300.0
"""The seconds that the launcher waits for the last of the ranks that end together. torch uses the same for a good end.
"""

CLOSE_S = 5.0
"""The seconds that the end of a job waits for a rendezvous that may be out of reach."""


class Rendezvous(dynamic_rendezvous.DynamicRendezvousHandler):
    """The meeting of launchers: torch's, with a new store for each attempt, and without waiting for a broken
    network."""

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the nodes of the next attempt."""
        # torch keeps the first attempt's store, in which ranks would find addresses of processes that are gone.
        self._bootstrap_store_info = self._shared_tcp_store_server = None
        return super().next_rendezvous()

    def num_nodes_waiting(self) -> int:
        """Return the number of nodes that want to join, as last read by the heartbeat thread. A new query could block
        for a minute."""
        return len(self._state_holder.state.wait_list)

    def shutdown(self) -> bool:
        """Close the job for all nodes, if that takes no longer than `CLOSE_S`."""
        thread = Thread(target=super().shutdown, daemon=True)
        thread.start()
        thread.join(CLOSE_S)
        return not thread.is_alive()


class Agent(LocalElasticAgent):
    """The agent that starts and watches the ranks of this node: torch's, with the rules above.

    `folder`: where ranks write their status and tracebacks. `passed_on`: the signals that came before.
    """

    def __init__(self, *args: Any, folder: Path, passed_on: set[int], **options: Any):
        super().__init__(*args, **options)
        self._folder = folder
        self._attempts = 0
        self._shown: dict[tuple[str, ...], str] = {}
        """The last line of each traceback that was printed in this attempt, by the lines that say where it was raised.
        """
        self.passed_on = passed_on
        self.code = 0
        """The exit code of the rank that failed first in the last attempt. A rank that a signal ended counts as 128 +
        its number."""
        for number in PASSED_ON:
            signal.signal(number, self._pass_on)

    def run(self, role: str = "default") -> RunResult:
        """Run all attempts. A node that stood by until the job was done has succeeded."""
        return super().run(role) or RunResult(state=WorkerState.SUCCEEDED)  # pyright: ignore[reportCallIssue] (torch's decorator)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self.passed_on:  # between two attempts
            raise SignalException("stopped", signal.SIGTERM)
        self.show_raised()
        self._shown.clear()
        self._attempts += 1
        if self._attempts > 1 and worker_group.group_rank == 0:
            ranks, nodes = worker_group.workers[0].world_size, worker_group.group_world_size
            place = f"{_count(ranks, 'rank')} on {_count(nodes, 'node')}"
            print(f"attempt {self._attempts}: {place}", file=sys.stderr, flush=True)
        for file in self._folder.iterdir():
            file.unlink()
        return super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = self._codes()
        if any(code in TOGETHER for code in codes.values()):
            deadline = time.monotonic() + END_S
            while None in codes.values() and time.monotonic() < deadline:
                time.sleep(0.1)
                codes = self._codes()
        failures = {rank: code for rank, code in codes.items() if code}
        if failures:
            self._judge(failures)
            # The remaining ranks hang in a collective. On SIGTERM they would try to finish it, so they are killed.
            for rank, code in codes.items():
                if code is None:
                    _send(self._context.subprocess_handlers[rank].proc.pid, signal.SIGKILL)
        return super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]

    def _judge(self, failures: dict[int, int]) -> None:
        """Decide about an attempt that failed on these local ranks: its exit code, and whether another attempt follows.

        Also print what the ranks left to the launcher.
        """
        local, code = next((f for f in failures.items() if f[1] not in TOGETHER), next(iter(failures.items())))
        if -code in self.passed_on:  # the rank was too early to handle the signal: there is nothing to save
            code = STOPPED
        if code in FINAL or self.passed_on:
            self._remaining_restarts = 0
        self.show_raised()
        if code < 0:
            rank = self._worker_group.workers[local].global_rank
            name = signal.Signals(-code).name
            hint = "; the machine may have run out of memory" if name == "SIGKILL" else flight_record()
            status = read_status(self._folder, rank)
            place = f" in {status}" if status else ""
            who = f"rank {rank} (host {socket.gethostname()})"
            print(f"error: {who} was killed by {name}{place}{hint}", file=sys.stderr, flush=True)
        self.code = code if code >= 0 else 128 - code

    def show_raised(self) -> None:
        """Print the tracebacks of this node's ranks. Equal tracebacks are printed once, with the differing last lines
        of the others."""
        for rank, path in sorted((int(path.name.rpartition("-")[2]), path) for path in self._folder.glob("raised-*")):
            text = path.read_text().rstrip()
            path.unlink()
            place = tuple(line for line in text.splitlines() if line.startswith("  File "))
            word = text.rpartition("\n")[2]
            if place in self._shown:
                text = "" if word == self._shown[place] else word
            self._shown.setdefault(place, word)
            for line in text.splitlines():
                print(f"[rank{rank}]: {line}", file=sys.stderr, flush=True)

    @property
    def _context(self) -> SubprocessContext:
        assert isinstance(self._pcontext, SubprocessContext), "ranks are commands, not functions"
        return self._pcontext

    def _codes(self) -> dict[int, int | None]:
        """Return exit codes by local rank, None while a rank runs. Empty before the first rank has started."""
        if self._pcontext is None:
            return {}
        return {rank: handler.proc.poll() for rank, handler in self._context.subprocess_handlers.items()}

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal. Raises `SignalException` if no rank is left to wait for, or after a second SIGINT."""
        running = [rank for rank, code in self._codes().items() if code is None]
        again = number == signal.SIGINT and number in self.passed_on
        passed = signal.SIGKILL if again else number
        self.passed_on.update((number, passed))
        for rank in running:
            _send(self._context.subprocess_handlers[rank].proc.pid, passed)
        # Ranks that have all ended, and are either not judged yet or wait for other nodes, end the job themselves.
        if again or self._worker_group.state in (WorkerState.INIT, WorkerState.STOPPED):
            raise SignalException("stopped", signal.Signals(number))


def _count(number: int | None, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _send(rank: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(rank, number)


def launch(argv: Sequence[str]) -> int:
    """Run the ranks as torchrun does with the same arguments. Returns 0, 75, or the code of the first rank that failed.

    A rank that was ended by a signal counts as 128 + the signal's number, as in a shell.
    """
    # torch's agent logs warnings about threads, about every signal it passes on, and about every failed rank.
    logging.disable(logging.ERROR)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = torchrun.parse_args(list(argv))
    args.signals_to_handle = "SIGHUP,SIGQUIT"  # the others are the agent's
    passed_on: set[int] = set()
    with TemporaryDirectory(prefix="steptron-") as folder:
        os.environ[FOLDER_VARIABLE] = os.environ[RAISED_VARIABLE] = folder
        if not args.standalone:
            return _launch(args, Path(folder), passed_on)
        path = Path(folder) / "next"
        os.environ[NEXT_VARIABLE] = str(path)
        code = _launch(args, Path(folder), passed_on)
        while code == OtherRanks.exit_code and (coming := read_next(path)) is not None:
            _change_ranks(args, coming)
            code = _launch(args, Path(folder), passed_on)
        return code


def _change_ranks(args: Any, coming: Next) -> None:
    """Change the launcher's arguments to those that the ranks have asked for."""
    args.nproc_per_node = str(coming.ranks)
    if coming.folder:
        args.training_script_args = ["resume", coming.folder]
    if cores := os.environ.get(CORES_VARIABLE):
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(cores) // coming.ranks))
    print(f"starting {_count(coming.ranks, 'rank')}", file=sys.stderr, flush=True)


def _launch(args: Any, folder: Path, passed_on: set[int]) -> int:
    agents: list[Agent] = []

    def make_agent(*words: Any, **options: Any) -> Agent:
        agents.append(Agent(*words, folder=folder, passed_on=passed_on, **options))
        return agents[0]

    launcher.LocalElasticAgent = make_agent  # pyright: ignore[reportPrivateImportUsage]
    dynamic_rendezvous.DynamicRendezvousHandler = Rendezvous
    try:
        torchrun.run(args)
    except ChildFailedError:
        return agents[0].code
    except SignalException as stop:  # no rank was running, or nobody waited for them (a second ^C, a closed terminal)
        waited = stop.sigval in PASSED_ON and signal.SIGKILL not in agents[0].passed_on
        return STOPPED if waited else 128 + stop.sigval.value
    except RendezvousClosedError:
        return _report("another node has ended the job; see its output")
    except RendezvousTimeoutError:
        return _report(
            f"--nnodes={args.nnodes}: too few nodes joined at {args.rdzv_endpoint}; start the others, or allow fewer"
        )
    except RendezvousError:
        return _report(
            f"--rdzv-endpoint={args.rdzv_endpoint}: no launcher answers there; start that node, or name another"
        )
    finally:
        for agent in agents:
            agent.show_raised()  # of ranks that nobody waited for
    return 0


def _report(problem: str) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    leave_with(lambda: launch(sys.argv[1:]))
