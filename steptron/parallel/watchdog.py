"""Detect which rank was lost: when a collective fails, the ranks agree on who is missing, and one rank reports it.

    RankStatus.enter(step, phase) ──► the store that all ranks share, and a file for the launcher, in case the rank dies
    a collective raises on a rank ──► the rank writes its answer to the store; threads of the other ranks answer too
    all have answered, or GRACE_S ──► the lowest rank that failed raises `RankLostError`; the others exit silently
    the store does not answer ──────► its host is the lost one: the first rank of each remaining host reports that

A rank that does not answer is dead or stopped. If a rank's main thread is outside of any collective while others wait
in one, they wait for that rank. An answer names the collective and the steptron function that called it, both taken
from the stack. If the launcher dies, the kernel sends SIGTERM to its ranks, so that they save and exit instead of
training on unnoticed.
"""

import faulthandler
import json
import logging
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple, NoReturn

import torch.distributed as dist
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    distributed_c10d,
)

from steptron.errors import RankLostError, SteptronError
from steptron.parallel import comm_timer, turns
from steptron.parallel.flight_record import flight_record
from steptron.parallel.rank_status import RankStatus
from steptron.torch_internals import default_store, functional

log = logging.getLogger("steptron")

POLL_S = 1.0
"""Interval in which a rank's thread asks the store whether a rank has failed, in seconds."""

GRACE_S = 5.0
"""Time for which a failed rank waits for the answers of the others, in seconds."""

CONFER_S = 10.0
"""Time in which the store must answer all questions of a failed rank, in seconds; it includes `GRACE_S`."""

LEAVE_S = 20.0
"""Time for which ranks with nothing to report wait for the launcher to stop them, in seconds.

They must not exit before the one error is reported.
"""

LAST_RESORT_S = 30.0
"""Time after which a rank exits, whatever it hangs in, in seconds."""

NAMED = 4
"""Largest number of lost ranks that an error describes one by one."""


class Answer(NamedTuple):
    """The state of a rank, reported once any rank has failed."""

    rank: int
    kind: Literal["failed", "waiting", "busy", "raised"]
    """failed: its collective failed. waiting: it is in a collective. busy: it runs other code.

    raised: it ended with an error that does not come from a collective.
    """
    place: str
    """The function, the collective or the error."""
    host: str
    status: str


class Board:
    """The messages of the ranks in the store; no method waits for another rank.

    Raises `RuntimeError` (from torch) if the store is gone.
    """

    def __init__(self, store: Store, rank: int):
        self._store = PrefixStore("watchdog", store)
        self._rank = rank
        self._host = socket.gethostname()
        self._answered = False
        self.store_host = ""
        """Name of rank 0's host, which holds the store; empty until rank 0 has written its status."""

    def write(self, status: str) -> None:
        """Publish this rank's status in the store."""
        self._store.set(f"at-{self._rank}", f"{self._host}\n{status}")

    def answer(self, kind: Literal["failed", "waiting", "busy", "raised"], place: str, status: str) -> None:
        answer = Answer(self._rank, kind, place, self._host, status)
        self._append("answers", json.dumps(answer) + "\n")
        if not self._answered:
            self._store.add("answered", 1)
        self._answered = True
        if kind == "failed":
            self._append("failed", f"{self._rank} ")

    def _append(self, key: str, text: str) -> None:
        self._store.append(key, text)  # pyright: ignore[reportAttributeAccessIssue] (torch's stubs lack it)

    def alarm(self) -> bool:
        """Return whether a collective has failed on any rank."""
        if not self.store_host and self._store.check(["at-0"]):
            self.store_host, _ = self.last_heard(0)
        return self._store.check(["failed"])

    def num_answers(self) -> int:
        """Return the number of ranks that have answered."""
        return self._store.add("answered", 0)

    def claims(self) -> bool:
        """Return whether this rank must report: it is the lowest that has failed, and no rank has reported yet."""
        lowest = min(map(int, self._store.get("failed").split()))
        mine = str(self._rank)
        return lowest == self._rank and self._store.compare_set("speaker", "", mine).decode() == mine

    def answers(self) -> list[Answer]:
        """Return the answers, ordered by rank.

        A rank may answer twice, first its thread and then its failed collective; the later answer counts.
        """
        lines = self._store.get("answers").decode().splitlines()
        by_rank = {answer.rank: answer for answer in (Answer(*json.loads(line)) for line in lines)}
        return [by_rank[rank] for rank in sorted(by_rank)]

    def last_heard(self, rank: int) -> tuple[str, str]:
        """Return the rank's host and its last status."""
        if not self._store.check([f"at-{rank}"]):
            return "unknown", "no step"
        host, status = self._store.get(f"at-{rank}").decode().split("\n")
        return host, status


@contextmanager
def watch_ranks(timeout_s: float) -> Iterator[RankStatus]:
    """Turn a failed collective inside of the block into one `RankLostError` on one rank; other errors pass through.

    `timeout_s` is the timeout of the process group in seconds; it is only named in the error.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        with closing(RankStatus(None, rank)) as status:
            yield status
        return
    store = default_store()
    status = RankStatus(Board(store, rank).write, rank)
    # The thread has its own connection: a store serves one call at a time, and the creation of groups can occupy it for
    # long.
    board = Board(store.clone(), rank)  # pyright: ignore[reportAttributeAccessIssue] (torch's stubs lack it)
    done = threading.Event()
    thread = threading.Thread(
        target=_answer_alarm, args=(board, status, threading.get_ident(), done), name="watchdog", daemon=True
    )
    thread.start()
    try:
        yield status
    except BaseException as error:
        done.set()
        thread.join(GRACE_S)
        _settle(error, board, status, world_size, timeout_s)
        raise
    finally:
        done.set()
        thread.join(GRACE_S)
        status.close()


def _answer_alarm(board: Board, status: RankStatus, main_thread: int, done: threading.Event) -> None:
    """Wait until `done` or until any rank has failed; then answer where this rank's main thread is."""
    try:
        while not done.wait(POLL_S):
            if board.alarm():
                kind, place = _where(sys._current_frames(), main_thread)
                board.answer(kind, place, status.text)
                return
    except RuntimeError:
        return  # the store is gone, and with it the rank that would read the answer


def _settle(error: BaseException, board: Board, status: RankStatus, world_size: int, timeout_s: float) -> None:
    """Raise `RankLostError`, or exit, if `error` comes from a collective.

    For any other error, tell the other ranks and return.
    """
    place = _failed_collective(error)
    if place is None:
        if not isinstance(error, SteptronError):
            log.error("%s", status.text, exc_info=error)  # the launcher shows one such error of all ranks
        with suppress(RuntimeError):  # report this error, not that of a store that is gone
            board.answer("raised", type(error).__name__, status.text)
        return
    how = f"did not end within {timeout_s:g} s" if "Timed out" in str(error) else "broke off"
    what = f"step {status.step}: {place} {how}"
    log.error("%s: %s", what, error)
    # The process group may hang when it is destroyed, and so may the interpreter. This timer ends the process without
    # either.
    faulthandler.dump_traceback_later(LAST_RESORT_S, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    try:
        culprit = _within(CONFER_S, lambda: _confer(board, place, status.text, world_size))
    except (RuntimeError, TimeoutError) as gone:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank:  # the launcher stops this rank as soon as the host's first rank has reported
            time.sleep(GRACE_S + 0.5 * local_rank)
        host = " ".join(filter(None, (board.store_host, f"({os.environ.get('MASTER_ADDR', 'address unknown')})")))
        log.error("the store: %s", gone)
        raise RankLostError(
            f"{what}; host {host}, which has rank 0 and the store for the status of all ranks, does not answer: "
            "the host, its launcher or the network to it is lost"
        ) from error
    if culprit is None:
        _leave()
    raise RankLostError(f"{what}: {culprit}{flight_record()}") from error


def _within(seconds: float, ask: Callable[[], str | None]) -> str | None:
    """Return or raise the result of `ask`, called on a thread that may be left hanging.

    Raises `TimeoutError` if it takes longer than `seconds`.
    """
    answer: queue.Queue[tuple[str | None, RuntimeError | None]] = queue.Queue()

    def run() -> None:
        try:
            answer.put((ask(), None))
        except RuntimeError as error:
            answer.put((None, error))

    threading.Thread(target=run, name="confer", daemon=True).start()
    try:
        value, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if error is not None:
        raise error
    return value


def _confer(board: Board, place: str, status: str, world_size: int) -> str | None:
    """Report this rank's failed collective, wait for the others' answers, and return who is missing, in words.

    Returns None if another rank must report.
    """
    board.answer("failed", place, status)
    deadline = time.monotonic() + GRACE_S
    while board.num_answers() < world_size and time.monotonic() < deadline:
        time.sleep(0.1)
    if not board.claims():
        return None
    answers = board.answers()
    if any(answer.kind == "raised" for answer in answers):
        return None  # the rank that raised it reports it
    return _culprit(answers, board, world_size)


def _culprit(answers: list[Answer], board: Board, world_size: int) -> str:
    """Return a message that names the ranks for which the others wait."""
    lost = sorted(set(range(world_size)) - {answer.rank for answer in answers})
    if lost:
        heard = [(rank, *board.last_heard(rank)) for rank in lost[:NAMED]]
        more = [f"{len(lost) - NAMED} more are lost too"] if len(lost) > NAMED else []
        return "; ".join(
            [f"rank {rank} (host {host}) was last heard of in {text}" for rank, host, text in heard] + more
        )
    busy = [answer for answer in answers if answer.kind == "busy"]
    if busy:
        return "; ".join(f"rank {a.rank} (host {a.host}) is in {a.status}, still in {a.place}" for a in busy[:NAMED])
    places: dict[str, int] = {}
    for answer in answers:
        places.setdefault(answer.place, answer.rank)
    return "no rank is missing; " + ", ".join(f"rank {rank} waits in {place}" for place, rank in places.items())


def _leave() -> NoReturn:
    """Exit silently, without running the destructors of a process group that has failed."""
    time.sleep(LEAVE_S)
    logging.shutdown()
    os._exit(RankLostError.exit_code)


def _failed_collective(error: BaseException) -> str | None:
    """Return the collective that raised `error`, and its caller; None if the error comes from anything else."""
    if not isinstance(error, RuntimeError):
        return None
    if not isinstance(error, dist.DistError) and not any(word in str(error).lower() for word in ("gloo", "nccl")):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return _where_in(frames)[1]


def _where(frames: dict[int, FrameType], main_thread: int) -> tuple[Literal["waiting", "busy"], str]:
    """Return whether this process is in a collective, and where.

    On CUDA, a backward pass runs in threads of its own, and so does the second pass of a pair everywhere; all else runs
    in the main thread. Other threads started by Python do not count, because training does not wait in them: the writer
    of checkpoints, for example, uses collectives too. A pass that waits for its turn is not where the rank is.
    """
    training = (threading._DummyThread, turns.SecondPass)
    others = {t.ident for t in threading.enumerate() if not isinstance(t, training)} - {main_thread}
    places = {
        thread: _where_in([f for f, _ in traceback.walk_stack(frame)][::-1])
        for thread, frame in frames.items()
        if thread not in others
    }
    asleep = {thread for thread, frame in frames.items() if frame.f_globals.get("__name__") == turns.__name__}
    awake = [main_thread, *places] if main_thread not in asleep else [*(places.keys() - asleep), main_thread]
    return next((place for place in places.values() if place[0] == "waiting"), places[awake[0]])


def _where_in(frames: Iterable[FrameType]) -> tuple[Literal["waiting", "busy"], str]:
    """Return whether these frames, outermost first, end in a collective, and where.

    The collective is the first function of torch.distributed below the last function of steptron, whatever frames of
    torch lie between the two.
    """
    caller, collective, innermost = "code outside steptron", None, ""
    for frame in frames:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module == comm_timer.__name__:
            continue  # it only measures the waiting time of the collective that it calls
        innermost = f"{function} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
        if module.startswith("steptron."):
            caller, collective = f"{function} ({module.removeprefix('steptron.').replace('.', '/')}.py)", None
        elif module in (distributed_c10d.__name__, functional.__name__):
            collective = collective or function
    return ("waiting", f"{collective} in {caller}") if collective else ("busy", f"{innermost}, called from {caller}")
