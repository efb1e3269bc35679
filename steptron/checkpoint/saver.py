"""Saves while training goes on: a snapshot in host memory, which a thread of its own writes and copies to the second place.

    training ── save ──► Staging (one snapshot) ──► thread: save.py, commit ──► place.py: mirror
             ◄── took: what has been written · failed: the step's all-reduce tells all ranks ◄──┘

One snapshot is being written at a time: `save` waits until the one before it is, not until it is copied.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from steptron.checkpoint.keep import Keep
from steptron.checkpoint.pieces import Piece, Staging, pieces_of
from steptron.checkpoint.place import Place, mirror
from steptron.checkpoint.save import save
from steptron.checkpoint.team import Team
from steptron.errors import CheckpointError

log = logging.getLogger("steptron")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """How a checkpoint, or its copy, went."""

    step: int
    """Optimizer steps done."""
    evidence: dict[str, Any]
    """For the ledger: path, seconds, stall_s, bytes of this rank · or `copied`, a place and steps · or `copy_failed`."""
    event: str = "checkpoint"
    """Kind of the ledger's line."""


class Saver:
    """One a rank. All ranks call `save` and `wait` together.

    Args:
        folder: of the checkpoints.
        keep: which of them stay.
        place: the second place; None: there is none.
        team: all ranks, in a group that nothing else uses.
        background: False: `save` returns when all is written.
    """

    def __init__(self, folder: Path, keep: Keep, place: Place | None, team: Team, background: bool):
        self._folder, self._keep, self._place, self.team = folder, keep, place, team
        self._staging = Staging() if background else None
        self._finished: queue.SimpleQueue[Saved] = queue.SimpleQueue()
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._written = threading.Event()
        self._written.set()
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written. The other ranks may not know yet."""
        return self._error is not None

    def save(
        self, step: int, state: Callable[[], Mapping[str, Tensor]], before: Callable[[], None], **description: Any
    ) -> None:
        """Save the tensors that `state` gives, as they are now; training waits for it too, if it has to gather them.

        `before` runs in the thread, before anything is written; `description`: counters, recipe_hash, layout (see `save.save`).
        Raises `SaveError` where the one before, or without a thread this one, could not be written."""
        start = time.perf_counter()
        self._written.wait()
        self._raise()
        pieces = self._staging.copy(state()) if self._staging else pieces_of(state())
        stall = time.perf_counter() - start
        self._written.clear()
        if self._staging is None:
            self._write(step, pieces, before, stall, description)
            self._raise()
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
            self._thread.start()
        self._tasks.put(lambda: self._write(step, pieces, before, stall, description))

    def took(self) -> list[Saved]:
        """What has ended since the last call."""
        done = []
        while not self._finished.empty():
            done.append(self._finished.get())
        return done

    def wait(self) -> None:
        """Until everything is written and copied. Raises `SaveError` on all ranks."""
        self._tasks.join()
        self._raise()

    def close(self, patience_s: float) -> None:
        """End the thread, with what it has begun unless that takes longer. Raises nothing."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join(patience_s)
            self._thread = None

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            self._tasks.task_done()  # also for one that has failed: whoever waits is to learn of it

    def _write(
        self,
        step: int,
        pieces: Mapping[str, Piece],
        before: Callable[[], None],
        stall: float,
        description: Mapping[str, Any],
    ) -> None:
        start = time.perf_counter()
        try:
            before()
            path = save(self._folder, step=step, pieces=pieces, keep=self._keep, team=self.team, **description)
            seconds = time.perf_counter() - start
            evidence = {
                "path": path.name,
                "seconds": round(seconds, 3),
                "stall_s": round(stall if self._staging else stall + seconds, 4),
                "bytes": sum(p.values.nbytes for p in pieces.values()),
            }
            self._finished.put(Saved(step=step, evidence=evidence))
            self._written.set()
            if self._place is not None:
                self._copy(step, self._place)
        except Exception as error:  # training is told of it at its next step
            self._error = error
        finally:
            self._written.set()

    def _copy(self, step: int, place: Place) -> None:
        start = time.perf_counter()
        try:
            steps = mirror(self._folder, step, place, self._keep, self.team)
        except CheckpointError as error:
            evidence = {"reason": str(error), "place": place.url}
            log.warning("%s: the copy of step %d is tried again after the next save", error, step)
            self._finished.put(Saved(step=step, evidence=evidence, event="copy_failed"))
        else:
            evidence = {"place": place.url, "steps": steps, "seconds": round(time.perf_counter() - start, 3)}
            self._finished.put(Saved(step=step, evidence=evidence, event="checkpoint_copied"))

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
