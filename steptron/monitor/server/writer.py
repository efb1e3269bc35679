"""The reducer's writer thread: it writes combined steps to Parquet while the next ones come in.

Steps are collected until they are worth a file: until `FLUSH_BYTES`, `flush_every` steps or `flush_s` seconds are
reached. The outcome of a step (on disk, or failed) is returned as a `WriteResult`.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from steptron.monitor.statistics.registry import Registry
from steptron.monitor.storage.store import Store

FLUSH_BYTES = 64 << 20
"""The number of bytes in memory above which a file is written."""
_TICK_S = 0.2

log = logging.getLogger("steptron.monitor.server")


@dataclass(frozen=True, kw_only=True)
class WriteJob:
    """A step to write."""

    key: Any
    """The key of its run."""
    store: Store
    registry: Registry
    attempt: int
    step: int
    plane: np.ndarray
    ranks: frozenset[int]
    absent: np.ndarray | None
    late: bool
    """True if it belongs to an earlier attempt."""


@dataclass(frozen=True, kw_only=True)
class WriteResult:
    """The result of writing steps of a run."""

    key: Any
    jobs: list[WriteJob]
    error: str | None
    """The error; None if the steps are on disk."""


@dataclass(kw_only=True)
class _Kept:
    """A run's steps in memory."""

    by_registry: dict[int, list[WriteJob]] = field(default_factory=dict)
    """Each list becomes files of its own: late frames of several ranks alternate with current steps."""
    since: float = 0.0
    soon: bool = False


@dataclass(frozen=True, kw_only=True)
class _Truncation:
    """The steps that a new attempt of a run drops."""

    store: Store
    step: int
    attempt: int
    also: Callable[[str], bool]


class Writer:
    """A writer thread. Its methods return at once, except that `write` waits if too much is queued."""

    def __init__(self, flush_every: int, flush_s: float, wake: Callable[[], object]):
        self._flush_every, self._flush_s, self._wake = flush_every, flush_s, wake
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=4)
        self.outcomes: queue.SimpleQueue[WriteResult] = queue.SimpleQueue()
        """The finished jobs; `wake` is called for each."""
        self._kept: dict[Any, _Kept] = {}
        self._stores: set[Store] = set()
        """All stores that were written to."""
        self._truncations: dict[Any, _Truncation] = {}
        """The unfinished truncations by run. Nothing is written to a run before they are done."""
        self.failure: Exception | None = None
        """The exception that ended the thread, if there was one."""
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def write(self, job: WriteJob) -> None:
        """Queue a step for writing."""
        self._tasks.put(lambda: self._add(job))

    def flush(self, key: Any) -> None:
        """Write a run's steps now, because its ranks wait for that."""
        self._tasks.put(lambda: self._hurry(key))

    def truncate_after(self, key: Any, store: Store, step: int, attempt: int, also: Callable[[str], bool]) -> None:
        """Drop the later steps of a run, also from the parts that `also` accepts.

        Steps that come afterwards belong to `attempt`.
        """
        asked = _Truncation(store=store, step=step, attempt=attempt, also=also)
        self._tasks.put(lambda: self._go_back(key, asked))

    def close(self) -> None:
        """Write all steps and end the thread."""
        self._tasks.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # a bug: the process must end instead of continuing without writing
            self.failure = error
            self._wake()

    def _work(self) -> None:
        while True:
            try:
                task = self._tasks.get(timeout=_TICK_S if self._kept else None)
                if task is None:
                    for key in list(self._kept):
                        self._flush(key)
                    for store in self._stores:
                        store.close()
                    return
                task()
            except queue.Empty:
                pass
            now = time.monotonic()
            for key, kept in list(self._kept.items()):
                if kept.soon or now - kept.since >= self._flush_s:
                    self._flush(key)

    def _add(self, job: WriteJob) -> None:
        kept = self._kept.setdefault(job.key, _Kept(since=time.monotonic()))
        kept.by_registry.setdefault(id(job.registry), []).append(job)
        jobs = [one for jobs in kept.by_registry.values() for one in jobs]
        if len(jobs) >= self._flush_every or sum(one.plane.nbytes for one in jobs) >= FLUSH_BYTES:
            self._flush(job.key)

    def _go_back(self, key: Any, asked: _Truncation) -> None:
        self._flush(key)
        if key in self._truncations:  # a truncation that failed; nothing has been written since
            asked = replace(asked, step=min(asked.step, self._truncations[key].step))
        self._truncations[key] = asked
        try:
            self._truncate(key)
        except Exception as error:  # remote file systems may raise anything
            log.warning("%s: later steps cannot be dropped, which is tried again: %s", key[0], error)

    def _truncate(self, key: Any) -> None:
        """Do the truncation that must come before anything is written."""
        asked = self._truncations.get(key)
        if asked is not None:
            asked.store.attempt = asked.attempt
            asked.store.truncate_after(asked.step, asked.also)
            del self._truncations[key]

    def _hurry(self, key: Any) -> None:
        if key in self._kept:
            self._kept[key].soon = True

    def _flush(self, key: Any) -> None:
        kept = self._kept.pop(key, None)
        for jobs in kept.by_registry.values() if kept is not None else ():
            error = None
            store = jobs[0].store
            self._stores.add(store)
            try:
                self._truncate(key)
                store.lay_out(jobs[0].registry, late=all(job.late for job in jobs))
                for job in jobs:
                    store.add(job.step, job.plane, job.ranks, job.absent)
                store.flush()
            except Exception as failure:  # of a remote file system or an invalid table: only this run is affected
                error = f"{type(failure).__name__}: {failure}"
            self.outcomes.put(WriteResult(key=key, jobs=jobs, error=error))
            self._wake()
