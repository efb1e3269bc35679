"""Keeps the second place like the run's folder, in a thread of its own: neither training nor the next save waits for it.

    a checkpoint is written ─► a round: what lies in the folder and not in the place is copied, what the rules let go is removed there

Ranks take the same rounds in the same order, each with its share of the files. A place that does not answer costs a round, which the next
one makes up for. One that hangs for longer than a collective may take ends the copying until the next start: ranks are out of step.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steptron.checkpoint.keep import Keep
from steptron.checkpoint.place import Place, mirror
from steptron.checkpoint.team import Team
from steptron.errors import CheckpointError

log = logging.getLogger("steptron")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """How a checkpoint, or a round of copies, went: a line for the ledger."""

    step: int
    """Optimizer steps done."""
    evidence: dict[str, Any]
    """path, seconds, stall_s, bytes of this rank · or place, steps, seconds · or place, reason."""
    event: str = "checkpoint"
    """Kind of the ledger's line."""


class Copier:
    """One a rank. All ranks call `copy` and `went_back` alike; nothing here raises.

    Args:
        folder: of the checkpoints.
        place: the second place.
        keep: which of them stay there.
        team: all ranks, in a group that nothing else uses.
        since: step that the run goes on from; what the place has of later ones is of a past that the run has left.
    """

    def __init__(self, folder: Path, place: Place, keep: Keep, team: Team, since: int):
        self._folder, self._place, self._keep, self._team = folder, place, keep, team
        self._since = since
        self._copying: set[int] = set()
        self._closing = False
        self.finished: queue.SimpleQueue[Saved] = queue.SimpleQueue()
        """Rounds that have ended, for who takes them."""
        self._rounds: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="copies", daemon=True)
        self._thread.start()

    def copying(self) -> Iterable[int]:
        """Steps whose checkpoints are not to be removed now."""
        return tuple(self._copying)

    def copy(self, step: int) -> None:
        """The checkpoint of that step has been written."""
        self._rounds.put(lambda: self._round(step))

    def went_back(self, step: int) -> None:
        """The run goes on from that step: what will be written of a later one is not what the place may have of it."""

        def set_back() -> None:
            self._since = min(self._since, step)

        self._rounds.put(set_back)

    def close(self, patience_s: float) -> None:
        """Finish the rounds that are due, unless that takes longer. Idempotent."""
        self._closing = True
        self._rounds.put(None)
        self._thread.join(patience_s)

    def _work(self) -> None:
        while (task := self._rounds.get()) is not None:
            try:
                task()
            except Exception as error:  # of a collective: a rank did not come, or came too late
                reason = " ".join(str(error).split()) or type(error).__name__
                told = f"checkpoint.copy_to={self._place.url}: ranks are out of step, nothing is copied until the next start"
                log.log(logging.INFO if self._closing else logging.WARNING, "%s: %s", told, reason)
                return

    def _round(self, step: int) -> None:
        start, url = time.perf_counter(), self._place.url
        reason = "ranks are out of step"
        try:
            steps = mirror(self._folder, step, self._since, self._place, self._keep, self._team, self._copying)
        except CheckpointError as error:
            reason = str(error)
            log.warning("%s: the copy of step %d is tried again after the next save", error, step)
        else:
            reason, self._since = "", step
            seconds = round(time.perf_counter() - start, 3)
            evidence = {"place": url, "steps": steps, "seconds": seconds}
            self.finished.put(Saved(step=step, evidence=evidence, event="checkpoint_copied"))
        finally:
            if reason:
                self.finished.put(Saved(step=step, evidence={"reason": reason, "place": url}, event="copy_failed"))
