"""Saving while training continues: a snapshot in host memory, which a thread writes.

    training ── save ──► Staging (one snapshot) ──► thread: save.py, commit ──► mirror.py: the mirror
             ◄── took: finished saves · failed: the step's all-reduce tells all ranks ◄──┘

One snapshot is written at a time: `save` waits for the one before it.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steptron.checkpoint.coordinator import Coordinator
from steptron.checkpoint.mirror import Mirror, Saved
from steptron.checkpoint.retention import Retention
from steptron.checkpoint.save import save
from steptron.checkpoint.staging import Staging, TensorPart, pieces_of
from steptron.worker import Worker


class Saver:
    """The saver of one rank. All ranks call `save` and `wait` together.

    Args:
        folder: folder of the checkpoints.
        keep: rules that say which of them stay.
        coordinator: all ranks, in a group that nothing else uses.
        mirror: copies checkpoints to a mirror; None if there is none.
        background: if False, `save` returns when everything is written.
    """

    def __init__(
        self, folder: Path, keep: Retention, coordinator: Coordinator, mirror: Mirror | None, background: bool
    ):
        self._folder, self._keep, self.coordinator, self._mirror = folder, keep, coordinator, mirror
        self._staging = Staging() if background else None
        self._finished: queue.SimpleQueue[Saved] = mirror.finished if mirror else queue.SimpleQueue()
        self._worker = Worker("checkpoints", self._fail)
        self._written = threading.Event()
        self._written.set()
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Return whether a checkpoint could not be written. The other ranks may not know it yet."""
        return self._error is not None

    def save(
        self, step: int, state: Callable[[], Mapping[str, Tensor]], before: Callable[[], None], **description: Any
    ) -> None:
        """Save the tensors that `state` gives, as they are now. Training also waits for `state`, if it has to gather
        them.

        `before` runs in the thread, before anything is written; `description`: counters, recipe_hash, layout (see
        `save.save`). Raises `SaveError` if the save before, or without a thread this one, could not be written.
        """
        start = time.perf_counter()
        self._written.wait()
        self._raise()
        pieces = self._staging.copy(state()) if self._staging else pieces_of(state())
        stall = time.perf_counter() - start
        self._written.clear()
        if self._staging is None:
            try:
                self._write(step, pieces, before, stall, description)
            except Exception as error:
                self._fail(error)
            self._raise()
            return
        self._worker.put(lambda: self._write(step, pieces, before, stall, description))

    def took(self) -> list[Saved]:
        """Return the saves and copies that have ended since the last call."""
        done = []
        while not self._finished.empty():
            done.append(self._finished.get())
        return done

    def wait(self) -> None:
        """Wait until everything is written. Raises `SaveError` on all ranks."""
        self._written.wait()
        self._raise()

    def went_back(self, step: int) -> None:
        """Note that the run continues from that step."""
        if self._mirror is not None:
            self._mirror.went_back(step)

    def close(self, patience_s: float) -> None:
        """End the threads when their work is done, or after `patience_s` seconds. Further calls do nothing."""
        deadline = time.monotonic() + patience_s
        self._worker.close(patience_s)
        if self._mirror is not None:
            self._mirror.close(max(0.0, deadline - time.monotonic()))

    def _write(
        self,
        step: int,
        pieces: Mapping[str, TensorPart],
        before: Callable[[], None],
        stall: float,
        description: Mapping[str, Any],
    ) -> None:
        start = time.perf_counter()
        before()
        path = save(
            self._folder, step=step, pieces=pieces, keep=self._keep, coordinator=self.coordinator, **description
        )
        seconds = time.perf_counter() - start
        evidence = {
            "path": path.name,
            "seconds": round(seconds, 3),
            "stall_s": round(stall if self._staging else stall + seconds, 4),
            "bytes": sum(p.values.nbytes for p in pieces.values()),
        }
        self._finished.put(Saved(step=step, evidence=evidence))
        if self._mirror is not None:
            self._mirror.copy(step)
        self._written.set()

    def _fail(self, error: Exception) -> bool:
        """Keep the error, which training learns of at its next step. Only then release whoever waits."""
        self._error = error
        self._written.set()
        return True

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
