"""The reducer process: it combines the frames of ranks into complete steps and passes them to the writer.

    open (hello) ─► Run ─► Merged layout
    frame ─► Run.steps[step] ── all ranks in, or the timeout ──► reduce ─► writer ─► on disk ─► the ranks are told

A frame stays in shared memory until its step is combined. A rank that is missing at the timeout is named once, and the
reducer does not wait for it again until it sends a frame. Frames that come later become further rows of their step,
which readers combine.
"""

import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from steptron.monitor.server.journal import Journal
from steptron.monitor.server.protocol import Hello, RefusedError, decode_registry
from steptron.monitor.server.shared import Slots
from steptron.monitor.server.writer import WriteJob, Writer
from steptron.monitor.statistics.merge import Merged, MismatchError, check_match
from steptron.monitor.statistics.registry import Registry
from steptron.monitor.storage.compact import recover
from steptron.monitor.storage.coverage import Coverage, format_ranks
from steptron.monitor.storage.files import FOLDER_NAME, Folder
from steptron.monitor.storage.store import Store, covered

RunKey = tuple[str, int]
"""The name of the run, and this server's position among its servers."""
StreamKey = tuple[int, int]
"""The receiver, and the number of the stream there."""

_POOL = 4
"""The number of planes kept for the next steps."""


@dataclass(kw_only=True)
class _Stream:
    """The frames of one connection."""

    hello: Hello
    registry: Registry
    slots: Slots
    pending: dict[int, None] = field(default_factory=dict)
    """The frames that are not on disk, in order."""
    received: int = 0
    told: int = 0
    """The number of frames that were confirmed to the rank."""


@dataclass(kw_only=True)
class _Frame:
    """A frame in shared memory."""

    stream: StreamKey
    slot: int
    values: np.ndarray | None
    """None if the step has no values and is only announced."""


@dataclass(kw_only=True)
class _Step:
    """A step for which frames are missing."""

    since: float
    frames: dict[int, _Frame] = field(default_factory=dict)


@dataclass(kw_only=True)
class _Run:
    """The server's knowledge of a run."""

    key: RunKey
    uid: str
    store: Store
    coverage: Coverage
    """The coverage on disk."""
    elsewhere: Coverage | None = None
    """The coverage of other parts up to step `resumed`; read when the first late frame comes."""
    late: dict[str, Merged] = field(default_factory=dict)
    """Layouts of late frames by the identity of their registry; their rank is 0 in them."""
    attempt: int
    resumed: int = 0
    expected: frozenset[int] = frozenset()
    """The ranks that send to this server."""
    members: dict[int, Registry] = field(default_factory=dict)
    merged: Merged | None = None
    steps: dict[int, _Step] = field(default_factory=dict)
    written: dict[int, set[int]] = field(default_factory=dict)
    """Ranks by step that the writer has, but that are not on disk yet."""
    tickets: dict[tuple[int, int], list[tuple[StreamKey, int]]] = field(default_factory=dict)
    """(rank, step) → the frames (stream, number) to confirm when it is on disk."""
    missing: set[int] = field(default_factory=set)
    """The ranks that are no longer waited for."""
    ending: set[StreamKey] = field(default_factory=set)
    """The streams whose ranks have sent everything and wait for it to be on disk."""


class Reducer:
    """The state of the process; `serve` is its loop."""

    def __init__(self, store: str, journal: Journal, timeout_s: float, flush_every: int, flush_s: float):
        self._store, self._journal, self._timeout_s = store, journal, timeout_s
        self._wake_r, self._wake_w = os.pipe()
        self._writer = Writer(flush_every, flush_s, lambda: os.write(self._wake_w, b"."))
        self._links: list[Connection] = []
        self._streams: dict[StreamKey, _Stream] = {}
        self._runs: dict[RunKey, _Run] = {}
        self._pool: list[np.ndarray] = []

    def serve(self, links: list[Connection], control: Connection) -> None:
        """Work until `control` says stop, or until its other end is gone."""
        self._links = links
        waiting: list[Any] = [*links, control, self._wake_r]
        while True:
            ready = wait(waiting, timeout=min(1.0, self._timeout_s / 4))
            for one in ready:
                if one is control:
                    self._stop()
                    return
                if one == self._wake_r:
                    os.read(self._wake_r, 4096)
                else:
                    assert isinstance(one, Connection)
                    if not self._receive(links.index(one), one):
                        waiting.remove(one)
            self._settle()
            self._expire()

    def _receive(self, receiver: int, link: Connection) -> bool:
        """Handle the messages of a receiver. Return False if it is gone."""
        try:
            for _ in range(64):  # then it is the others' turn
                if not link.poll():
                    break
                kind, *content = link.recv()
                try:
                    self._handle(receiver, link, kind, *content)
                except (EOFError, ConnectionResetError):
                    raise
                except Exception as error:  # one message must not end the server for all runs
                    self._reset((receiver, content[0]), f"{kind}: {type(error).__name__}: {error}")
        except (EOFError, ConnectionResetError):
            return False
        return True

    def _handle(self, receiver: int, link: Connection, kind: str, number: Any, *content: Any) -> None:
        key = (receiver, number)
        match kind:
            case "open":
                self._open(key, link, *content)
            case "frame":
                self._frame(key, *content)
            case "end" if key in self._streams:
                self._end(key)
            case "gone":
                self._gone(key)
            case "refused":
                self._journal.refuse(number, *content)

    def _reset(self, key: StreamKey, why: str) -> None:
        """Refuse further frames of a stream that has sent something invalid."""
        self._journal.refuse("failed", why)
        self._say(key, "reset", why)
        self._gone(key)

    def _say(self, stream: StreamKey, kind: str, *content: Any) -> None:
        with suppress(OSError):  # the receiver is gone, and its ranks will connect again
            self._links[stream[0]].send((kind, stream[1], *content))

    # ── streams ──

    def _open(self, key: StreamKey, link: Connection, hello: Hello, values: int, count: int) -> None:
        slots = Slots.receive(link, values, count)
        try:
            registry = decode_registry(hello.registry)
            run = self._run_of(hello)
            if not hello.late:
                check_match(registry, {r: other for r, other in run.members.items() if r != hello.rank})
                if run.members.setdefault(hello.rank, registry).identity != registry.identity:
                    raise RefusedError("registry", "it changed within an attempt of the run")
                run.missing.discard(hello.rank)
        except (RefusedError, MismatchError) as error:
            kind, detail = (error.kind, error.detail) if isinstance(error, RefusedError) else ("registry", str(error))
            self._journal.refuse(kind, f"{hello.run}, rank {hello.rank}: {detail}")
            self._say(key, "opened", str(error))
            return
        except Exception as error:  # remote file systems may raise anything
            self._journal.refuse("store", f"{hello.run}: {type(error).__name__}: {error}")
            self._say(key, "opened", f"the store cannot be used: {error}")
            return
        self._streams[key] = _Stream(hello=hello, registry=registry, slots=slots)
        self._say(key, "opened", None)

    def _run_of(self, hello: Hello) -> _Run:
        """Return the run of a hello, at the hello's attempt."""
        key = (hello.run, hello.server)
        run = self._runs.get(key)
        if run is None or run.uid != hello.uid:
            folder = f"{self._store.rstrip('/')}/{hello.run}/{FOLDER_NAME}"
            part = part_name(hello.server)
            self._claim(Folder.at(folder), hello, run)
            if run is not None:
                run.store.abandon()
            coverage, attempt = recover(Folder.at(folder), part)
            store = Store(folder, part, Registry(), 1 << 30, attempt, hello.uid)
            run = self._runs[key] = _Run(key=key, uid=hello.uid, store=store, coverage=coverage, attempt=attempt)
        if hello.attempt < run.attempt:
            raise RefusedError("attempt", f"rank {hello.rank} is of an attempt that is over")
        if hello.attempt > run.attempt:
            self._restart(run, hello)
        if not run.expected:  # the server has been started again
            run.resumed = hello.resumed
            run.expected = _share(hello)
        return run

    def _claim(self, place: Folder, hello: Hello, run: _Run | None) -> None:
        """Raise `RefusedError` if another run has this name and has data or is running."""
        under_way = run is not None and (run.steps or run.written or self._streams_of(run.key))
        others = place.owner() not in ("", hello.uid)
        if under_way or (others and place.files()):
            raise RefusedError(
                "another run", f"run.name={hello.run} is taken by another run: choose another, or delete {place.path}"
            )
        if others:  # and it never stored anything
            place.disown()

    def _streams_of(self, key: RunKey) -> list[StreamKey]:
        """Return the open streams of a run."""
        return [one for one, stream in self._streams.items() if (stream.hello.run, stream.hello.server) == key]

    def _restart(self, run: _Run, hello: Hello) -> None:
        """Begin a new attempt of a run: drop the steps after the one from which it continues."""
        for key in self._streams_of(run.key):
            self._say(key, "reset", "another attempt of the run has begun")
            del self._streams[key]
        run.steps.clear()
        # Keep what the writer has of the remaining steps, so that it is not accepted a second time.
        run.written = {step: ranks for step, ranks in run.written.items() if step <= hello.resumed}
        run.tickets = {key: [] for key in run.tickets if key[0] in run.written.get(key[1], ())}
        run.members.clear()
        run.missing.clear()
        run.ending.clear()
        run.late.clear()
        run.merged = run.elsewhere = None
        run.attempt, run.resumed, run.expected = hello.attempt, hello.resumed, _share(hello)
        run.coverage.truncate_after(hello.resumed)
        self._writer.truncate_after(run.key, run.store, hello.resumed, hello.attempt, _answers_for(hello))

    def _end(self, key: StreamKey) -> None:
        """Write a rank's frames soon: the rank has sent all of them and waits."""
        hello = self._streams[key].hello
        run = self._runs[hello.run, hello.server]
        run.ending.add(key)
        self._writer.flush(run.key)

    def _gone(self, key: StreamKey) -> None:
        """Forget a connection that has ended. Its frames of open steps stay: this process holds their memory."""
        stream = self._streams.pop(key, None)
        if stream is not None:
            self._runs[stream.hello.run, stream.hello.server].ending.discard(key)

    # ── frames ──

    def _frame(self, key: StreamKey, number: int, step: int, slot: int, has_values: bool) -> None:
        stream = self._streams.get(key)
        if stream is None:
            return
        hello = stream.hello
        run = self._runs[hello.run, hello.server]
        stream.received = number + 1
        stream.pending[number] = None
        if (step <= run.resumed) != hello.late:
            self._journal.refuse(
                "step", f"{hello.run}, rank {hello.rank}: step {step}, the run continues from {run.resumed}"
            )
            self._drop(key, stream, number, slot)
        elif (hello.rank, step) in run.tickets:  # a duplicate, not on disk yet
            run.tickets[hello.rank, step].append((key, number))
            self._say(key, "free", slot)
        elif hello.rank in run.coverage.ranks(step) or (
            hello.late and self._is_elsewhere(run, hello.rank, step)
        ):  # a duplicate
            self._drop(key, stream, number, slot)
        else:
            run.tickets[hello.rank, step] = [(key, number)]
            values = stream.slots.view(slot) if has_values else None
            frame = _Frame(stream=key, slot=slot, values=values)
            run.missing.discard(hello.rank)
            if hello.late:
                self._close_late(run, step, hello.rank, stream.registry, frame)
                return
            run.steps.setdefault(step, _Step(since=time.monotonic())).frames[hello.rank] = frame
            self._close_if_whole(run, step)

    def _is_elsewhere(self, run: _Run, rank: int, step: int) -> bool:
        """Return whether another part has these values, perhaps from an attempt with another number of servers."""
        if run.elsewhere is None:
            own = run.store.part
            run.elsewhere = covered(run.store.folder, lambda part: part != own)
        return rank in run.elsewhere.ranks(step)

    def _drop(self, key: StreamKey, stream: _Stream, number: int, slot: int) -> None:
        """Confirm a frame that is not needed."""
        self._say(key, "free", slot)
        del stream.pending[number]
        self._tell(key, stream)

    def _tell(self, key: StreamKey, stream: _Stream) -> None:
        """Tell the rank how many of its frames are on disk, if the number has grown."""
        done = next(iter(stream.pending), stream.received)
        if done > stream.told:
            stream.told = done
            self._say(key, "ack", done)

    # ── steps ──

    def _close_if_whole(self, run: _Run, number: int) -> None:
        awaited = run.expected - run.missing - run.steps[number].frames.keys()
        if awaited and awaited <= (run.coverage.ranks(number) | run.written.get(number, set())):
            awaited = frozenset()
        if not awaited:
            self._close(run, number)

    def _close(self, run: _Run, number: int) -> None:
        """Combine the frames of a step that have come."""
        frames = run.steps.pop(number).frames
        valued = [(rank, frame.values) for rank, frame in sorted(frames.items()) if frame.values is not None]
        try:
            if run.merged is None or any(run.merged.members.get(rank) is not run.members[rank] for rank in frames):
                run.merged = Merged(run.members)
            job = self._reduce(run, number, frozenset(frames), valued, run.merged)
        except Exception as error:  # the ranks' registries do not match
            self._give_up(run, number, frames, error)
        else:
            self._hand_over(run, job, frames.values())

    def _close_late(self, run: _Run, number: int, rank: int, registry: Registry, frame: _Frame) -> None:
        """Write a frame of an earlier attempt as rows of its own: the ranks of that step are no longer known."""
        identity = registry.identity
        try:
            merged, member = run.merged, rank
            if merged is None or rank not in merged.members or merged.members[rank].identity != identity:
                merged, member = run.late.get(identity), 0
                if merged is None:
                    merged = run.late[identity] = Merged({member: registry})
            valued = [] if frame.values is None else [(member, frame.values)]
            job = self._reduce(run, number, frozenset([rank]), valued, merged, late=True)
        except Exception as error:
            self._give_up(run, number, {rank: frame}, error)
        else:
            self._hand_over(run, job, [frame])

    def _reduce(
        self,
        run: _Run,
        number: int,
        ranks: frozenset[int],
        valued: list[tuple[int, np.ndarray]],
        merged: Merged,
        late: bool = False,
    ) -> WriteJob:
        """Combine the frames of `valued`, pairs of a member and its frame, to step `number` of `ranks`."""
        slots = merged.registry.slots
        plane = next((self._pool.pop(i) for i, p in enumerate(self._pool) if len(p) == slots), None)
        if plane is None:
            plane = np.empty(slots, np.float32)
        merged.reduce(valued, plane)
        return WriteJob(
            key=run.key,
            store=run.store,
            registry=merged.registry,
            attempt=run.attempt,
            step=number,
            plane=plane,
            ranks=ranks,
            absent=merged.absent([member for member, _ in valued]),
            late=late,
        )

    def _hand_over(self, run: _Run, job: WriteJob, frames: Collection[_Frame]) -> None:
        """Pass a job to the writer, and free the slots of its frames."""
        self._release(frames)
        run.written.setdefault(job.step, set()).update(job.ranks)
        self._writer.write(job)
        if run.ending:
            self._writer.flush(run.key)

    def _give_up(self, run: _Run, number: int, frames: dict[int, _Frame], error: Exception) -> None:
        """Give up frames that cannot be combined: their ranks keep them, and send them again."""
        for rank in frames:
            run.tickets.pop((rank, number), None)
        for key in {frame.stream for frame in frames.values()}:
            self._reset(key, f"{run.key[0]}, step {number}: {type(error).__name__}: {error}")
        self._release(frames.values())

    def _release(self, frames: Collection[_Frame]) -> None:
        for frame in frames:
            frame.values = None
            self._say(frame.stream, "free", frame.slot)

    def _expire(self) -> None:
        """Close steps that have waited long enough, and report the missing ranks."""
        now = time.monotonic()
        for run in self._runs.values():
            for number in sorted(n for n, step in run.steps.items() if now - step.since > self._timeout_s):
                if number not in run.steps:  # closed with an earlier one
                    continue
                there = run.steps[number].frames.keys() | run.coverage.ranks(number) | run.written.get(number, set())
                missing = run.expected - there - run.missing
                if missing:
                    run.missing |= missing
                    text = f"{run.key[0]}: no frame of step {number} from rank {format_ranks(missing)}"
                    text += f" within {self._timeout_s:g} s; not waited for until it sends again"
                    self._journal.write("missing", text, run=run.key[0], step=number, ranks=sorted(missing))
                self._close(run, number)
                for other in sorted(run.steps):
                    self._close_if_whole(run, other)

    # ── what the writer did ──

    def _settle(self) -> None:
        if self._writer.failure is not None:
            raise self._writer.failure
        while not self._writer.outcomes.empty():
            outcome = self._writer.outcomes.get()
            run = self._runs[outcome.key]
            if len(self._pool) < _POOL:
                self._pool += [job.plane for job in outcome.jobs]
            jobs = [job for job in outcome.jobs if job.attempt == run.attempt or job.step <= run.resumed]
            for job in jobs:
                run.written[job.step] -= job.ranks
                if not run.written[job.step]:
                    del run.written[job.step]
            if outcome.error is None:
                self._persisted(run, jobs)
            else:
                self._failed(run, jobs, outcome.error)

    def _persisted(self, run: _Run, jobs: list[WriteJob]) -> None:
        touched: set[StreamKey] = set()
        for job in jobs:
            run.coverage.add(job.step, job.ranks)
            for rank in job.ranks:
                for key, number in run.tickets.pop((rank, job.step), []):
                    if key in self._streams:
                        self._streams[key].pending.pop(number, None)
                        touched.add(key)
        for key in touched:
            self._tell(key, self._streams[key])

    def _failed(self, run: _Run, jobs: list[WriteJob], error: str) -> None:
        """Let the ranks send their frames again, because the store could not write them."""
        self._journal.refuse("store", f"{run.key[0]}: {error}; ranks keep their frames and come again")
        for job in jobs:
            for rank in job.ranks:
                run.tickets.pop((rank, job.step), None)
        for key in self._streams_of(run.key):
            self._say(key, "reset", f"the store cannot be written: {error}")
            self._gone(key)

    def _stop(self) -> None:
        """Write all steps, complete or not, and confirm them to the ranks."""
        for receiver, link in enumerate(self._links):
            self._receive(receiver, link)
        for run in self._runs.values():
            for number in sorted(run.steps):
                self._close(run, number)
        self._writer.close()
        self._settle()
        refused = dict(self._journal.refused)
        self._journal.write("stop", f"stopped; refused by kind: {refused or 'nothing'}", refused=refused)


def _share(hello: Hello) -> frozenset[int]:
    """Return the ranks that send to this server."""
    return frozenset(range(hello.server, hello.ranks, hello.servers))


def _answers_for(hello: Hello) -> Callable[[str], bool]:
    """Return a test for the parts without a server, which the first server truncates when a new attempt begins."""
    written = {part_name(server) for server in range(hello.servers)}
    return lambda part: hello.server == 0 and part not in written


def part_name(server: int) -> str:
    """Return the name of the part that a server writes."""
    return f"server-{server:02d}"


def make_reducer(store: str, log_file: Path, name: str, timeout_s: float, flush_every: int, flush_s: float) -> Reducer:
    """Return a reducer with its journal."""
    return Reducer(store, Journal(log_file, name), timeout_s, flush_every, flush_s)
