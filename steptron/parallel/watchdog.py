"""Which rank was lost: when a collective fails, the ranks agree on who is missing, and one of them says so.

    Whereabouts.enter(step, phase) ──► the store that all ranks share, and a file that the launcher reads when a signal kills the rank
    a collective raises on a rank ───► its answer to the store; the other ranks' threads see it and answer for their main threads
    every answer, or GRACE_S later ──► the lowest rank that failed raises `RankLostError`; the others leave without a word
    no store that answers ───────────► its host is the one that is lost: the first rank of each host that is left says so

A rank that answers nothing is dead or stopped. One whose main thread is not in a collective while others wait is the one they wait
for. What an answer says of a collective is its name and the steptron function that called it, from the stack. A rank whose launcher
has died gets SIGTERM from the kernel, so that it saves and ends rather than train on where nobody sees it.
"""

import ctypes
import faulthandler
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from glob import glob
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple, NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from steptron.errors import RankLostError, SteptronError
from steptron.parallel import comm_timer

log = logging.getLogger("steptron")

FOLDER_VARIABLE = "STEPTRON_WHEREABOUTS"
"""Environment variable with the folder where the launcher looks for its ranks' whereabouts, one file a rank."""

POLL_S = 1.0
"""How often a rank's thread asks the store whether a rank has failed."""

GRACE_S = 5.0
"""How long a rank that has failed waits for the others' answers."""

CONFER_S = 10.0
"""How long a store may take to answer all of a failed rank's questions; longer than `GRACE_S`, which is part of it."""

LEAVE_S = 20.0
"""How long ranks that have nothing to say wait for the launcher to stop them: their own end must not outrun the one error."""

LAST_RESORT_S = 30.0
"""After which a rank ends, whatever it hangs in."""

PR_SET_PDEATHSIG = 1
"""prctl's number for the signal that this process gets when its parent dies."""

NAMED = 4
"""Lost ranks that an error names one by one."""


class Answer(NamedTuple):
    """What a rank says of itself once a rank has failed."""

    rank: int
    kind: Literal["failed", "waiting", "busy", "raised"]
    """In a collective that failed · in one that goes on · in other code · ended by an error that is not a collective's."""
    place: str
    """Function, collective or error."""
    host: str
    whereabouts: str


class Board:
    """What ranks tell each other through the store; nothing here waits for another rank.

    Raises `RuntimeError` (of torch) where the store is gone."""

    def __init__(self, store: Store, rank: int):
        self._store = PrefixStore("watchdog", store)
        self._rank = rank
        self._host = socket.gethostname()
        self._answered = False
        self.store_host = ""
        """Name of rank 0's host, where the store lies; empty until rank 0 was heard of."""

    def write(self, whereabouts: str) -> None:
        """A message to the store that nobody waits for."""
        self._store.set(f"at-{self._rank}", f"{self._host}\n{whereabouts}")

    def answer(self, kind: Literal["failed", "waiting", "busy", "raised"], place: str, whereabouts: str) -> None:
        answer = Answer(self._rank, kind, place, self._host, whereabouts)
        self._append("answers", json.dumps(answer) + "\n")
        if not self._answered:
            self._store.add("answered", 1)
        self._answered = True
        if kind == "failed":
            self._append("failed", f"{self._rank} ")

    def _append(self, key: str, text: str) -> None:
        self._store.append(key, text)  # pyright: ignore[reportAttributeAccessIssue] (torch's stubs lack it)

    def alarm(self) -> bool:
        """Whether a collective has failed on any rank."""
        if not self.store_host and self._store.check(["at-0"]):
            self.store_host, _ = self.last_heard(0)
        return self._store.check(["failed"])

    def num_answers(self) -> int:
        """Ranks that have answered."""
        return self._store.add("answered", 0)

    def claims(self) -> bool:
        """Whether this rank is the one to speak: the lowest that has failed, and none has spoken yet."""
        lowest = min(map(int, self._store.get("failed").split()))
        mine = str(self._rank)
        return lowest == self._rank and self._store.compare_set("speaker", "", mine).decode() == mine

    def answers(self) -> list[Answer]:
        """By rank; a rank that answered twice (its thread, then its failed collective) with the later one."""
        lines = self._store.get("answers").decode().splitlines()
        by_rank = {answer.rank: answer for answer in (Answer(*json.loads(line)) for line in lines)}
        return [by_rank[rank] for rank in sorted(by_rank)]

    def last_heard(self, rank: int) -> tuple[str, str]:
        """Host and whereabouts."""
        if not self._store.check([f"at-{rank}"]):
            return "unknown", "no step"
        host, whereabouts = self._store.get(f"at-{rank}").decode().split("\n")
        return host, whereabouts


class RankStatus:
    """Step and phase of this rank, as others can read them when it is gone. `enter` costs some ten microseconds."""

    def __init__(self, board: Board | None, rank: int):
        self.step, self.text = 0, ""
        self._board = board
        folder = os.environ.get(FOLDER_VARIABLE)
        self._file = os.open(Path(folder) / str(rank), os.O_WRONLY | os.O_CREAT) if folder else None
        if folder and sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def enter(self, step: int, phase: str) -> None:
        """This rank is now in `phase` of `step`."""
        self.step, self.text = step, f"step {step}, {phase}"
        if self._file is not None:
            os.pwrite(self._file, f"{self.text}\n".encode(), 0)
        if self._board is not None:
            with suppress(RuntimeError):  # no step fails because nobody can be told of it
                self._board.write(self.text)

    def close(self) -> None:
        """Close the launcher's file."""
        if self._file is not None:
            os.close(self._file)


def read_whereabouts(folder: Path, rank: int) -> str:
    """What rank `rank` of this machine last said of itself, empty where it said nothing; for the launcher."""
    path = folder / str(rank)
    return path.read_text().partition("\n")[0] if path.exists() else ""


def flight_record() -> str:
    """Where torch's flight recorder left the last collectives of this host's ranks, in words; empty where it did not.

    NCCL's watchdog writes it when a collective times out, where `launch/env.sh` says."""
    prefix = os.environ.get("TORCH_FR_DUMP_TEMP_FILE", "")
    return f"; the last collectives are in {prefix}*" if prefix and glob(f"{prefix}*") else ""


@contextmanager
def watch_ranks(timeout_s: float) -> Iterator[RankStatus]:
    """Turns a failed collective inside into one `RankLostError` on one rank; other errors pass through.

    `timeout_s`: what the process group was given; it is only named."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        with closing(RankStatus(None, rank)) as whereabouts:
            yield whereabouts
        return
    store = _get_default_store()
    whereabouts = RankStatus(Board(store, rank), rank)
    # Its own connection: one call at a time goes through a store, and creating groups can hold it for long.
    board = Board(store.clone(), rank)  # pyright: ignore[reportAttributeAccessIssue] (torch's stubs lack it)
    done = threading.Event()
    thread = threading.Thread(
        target=_answer_alarm, args=(board, whereabouts, threading.get_ident(), done), name="watchdog", daemon=True
    )
    thread.start()
    try:
        yield whereabouts
    except BaseException as error:
        done.set()
        thread.join(GRACE_S)
        _settle(error, board, whereabouts, world_size, timeout_s)
        raise
    finally:
        done.set()
        thread.join(GRACE_S)
        whereabouts.close()


def _answer_alarm(board: Board, whereabouts: RankStatus, main_thread: int, done: threading.Event) -> None:
    """Until `done`: once any rank has failed, say where this rank's main thread is."""
    try:
        while not done.wait(POLL_S):
            if board.alarm():
                kind, place = _where(sys._current_frames(), main_thread)
                board.answer(kind, place, whereabouts.text)
                return
    except RuntimeError:
        return  # the store is gone, and with it whoever would read the answer


def _settle(error: BaseException, board: Board, whereabouts: RankStatus, world_size: int, timeout_s: float) -> None:
    """Raise `RankLostError`, or leave the process, if `error` comes from a collective. Returns for other errors, announced."""
    place = _failed_collective(error)
    if place is None:
        if not isinstance(error, SteptronError):
            log.error("%s", whereabouts.text, exc_info=error)  # the launcher shows one of those of all ranks
        with suppress(RuntimeError):  # this error is the one to be seen, not that of a store that has gone
            board.answer("raised", type(error).__name__, whereabouts.text)
        return
    how = f"did not end within {timeout_s:g} s" if "Timed out" in str(error) else "broke off"
    what = f"step {whereabouts.step}: {place} {how}"
    log.error("%s: %s", what, error)
    # The process group may hang when it is taken down, and so may the interpreter: this thread needs neither to end it.
    faulthandler.dump_traceback_later(LAST_RESORT_S, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    try:
        culprit = _within(CONFER_S, lambda: _confer(board, place, whereabouts.text, world_size))
    except (RuntimeError, TimeoutError) as gone:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank:  # the launcher stops this one as soon as the host's first has spoken
            time.sleep(GRACE_S + 0.5 * local_rank)
        host = " ".join(filter(None, (board.store_host, f"({os.environ.get('MASTER_ADDR', 'address unknown')})")))
        log.error("the store: %s", gone)
        raise RankLostError(
            f"{what}; host {host}, with rank 0 and the store by which ranks tell each other's state, does not answer: "
            "it, its launcher or the network between is lost"
        ) from error
    if culprit is None:
        _leave()
    raise RankLostError(f"{what}: {culprit}{flight_record()}") from error


def _within(seconds: float, ask: Callable[[], str | None]) -> str | None:
    """What `ask` returns or raises, on a thread that may be left hanging. Raises `TimeoutError` where it takes longer."""
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


def _confer(board: Board, place: str, whereabouts: str, world_size: int) -> str | None:
    """Tell the others of this rank's failed collective, hear them, and say who is missing; None where another rank is to speak."""
    board.answer("failed", place, whereabouts)
    deadline = time.monotonic() + GRACE_S
    while board.num_answers() < world_size and time.monotonic() < deadline:
        time.sleep(0.1)
    if not board.claims():
        return None
    answers = board.answers()
    if any(answer.kind == "raised" for answer in answers):
        return None  # the rank with the error reports it
    return _culprit(answers, board, world_size)


def _culprit(answers: list[Answer], board: Board, world_size: int) -> str:
    """Who the others wait for, in words."""
    lost = sorted(set(range(world_size)) - {answer.rank for answer in answers})
    if lost:
        heard = [(rank, *board.last_heard(rank)) for rank in lost[:NAMED]]
        more = [f"{len(lost) - NAMED} more are lost too"] if len(lost) > NAMED else []
        return "; ".join(
            [f"rank {rank} (host {host}) was last heard of in {text}" for rank, host, text in heard] + more
        )
    busy = [answer for answer in answers if answer.kind == "busy"]
    if busy:
        return "; ".join(
            f"rank {a.rank} (host {a.host}) is in {a.whereabouts}, still in {a.place}" for a in busy[:NAMED]
        )
    places: dict[str, int] = {}
    for answer in answers:
        places.setdefault(answer.place, answer.rank)
    return "no rank is missing; " + ", ".join(f"rank {rank} waits in {place}" for place, rank in places.items())


def _leave() -> NoReturn:
    """End this process without a word, and without the destructors of a process group that has failed."""
    time.sleep(LEAVE_S)
    logging.shutdown()
    os._exit(RankLostError.exit_code)


def _failed_collective(error: BaseException) -> str | None:
    """The collective that `error` comes from, and who called it; None where it comes from anything else."""
    if not isinstance(error, RuntimeError):
        return None
    if not isinstance(error, dist.DistError) and not any(word in str(error).lower() for word in ("gloo", "nccl")):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return _where_in(frames)[1]


def _where(frames: dict[int, FrameType], main_thread: int) -> tuple[Literal["waiting", "busy"], str]:
    """Whether this process is in a collective, and where. A backward pass on CUDA has threads of its own; the rest is the main thread's.

    Threads that Python has started (the writer of checkpoints meets other ranks too) do not count: training does not wait in them."""
    others = {t.ident for t in threading.enumerate() if not isinstance(t, threading._DummyThread)} - {main_thread}
    places = {
        thread: _where_in([f for f, _ in traceback.walk_stack(frame)][::-1])
        for thread, frame in frames.items()
        if thread not in others
    }
    return next((place for place in places.values() if place[0] == "waiting"), places[main_thread])


def _where_in(frames: Iterable[FrameType]) -> tuple[Literal["waiting", "busy"], str]:
    """From the outermost frame to the innermost one: the first function of torch.distributed that was called from the last one of
    steptron, through whatever of torch lies between."""
    caller, collective, innermost = "code outside steptron", None, ""
    for frame in frames:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module == comm_timer.__name__:
            continue  # it only measures the wait that it calls
        innermost = f"{function} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
        if module.startswith("steptron."):
            caller, collective = f"{function} ({module.removeprefix('steptron.').replace('.', '/')}.py)", None
        elif module in ("torch.distributed.distributed_c10d", "torch.distributed._functional_collectives"):
            collective = collective or function
    return ("waiting", f"{collective} in {caller}") if collective else ("busy", f"{innermost}, called from {caller}")
