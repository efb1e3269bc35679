"""The thread that copies checkpoints to the mirror: one round per save, in step on all ranks (see remote.py).

    a checkpoint is written ─► a round: copy what the mirror lacks, remove there what the retention rules no longer keep

Ranks make the same rounds in the same order, each with its share of the files. If the mirror does not answer, one
round fails, and the next one copies what is missing. If it hangs for longer than a collective may take, copying ends
until the next start, because the ranks are then out of step.
"""

import logging
import queue
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steptron.checkpoint.coordinator import Coordinator
from steptron.checkpoint.remote import Remote, mirror
from steptron.checkpoint.retention import Retention
from steptron.errors import CheckpointError
from steptron.worker import Worker

log = logging.getLogger("steptron")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The result of a checkpoint or of a round of copies: a line for the ledger."""

    step: int
    """The number of finished optimizer steps."""
    evidence: dict[str, Any]
    """The details: path, seconds, stall_s, bytes of this rank · or place, steps, seconds · or place, reason."""
    event: str = "checkpoint"
    """The kind of the ledger's line."""


class Mirror:
    """The mirror of one rank. All ranks call `copy` and `went_back` in the same order; no method raises.

    Args:
        folder: folder of the checkpoints.
        remote: the mirror.
        keep: rules that say which checkpoints stay there.
        coordinator: all ranks, in a group that nothing else uses.
        since: step from which the run continues; later steps in the mirror belong to a past that the run has left.
    """

    def __init__(self, folder: Path, remote: Remote, keep: Retention, coordinator: Coordinator, since: int):
        self._folder, self._remote, self._keep, self._coordinator = folder, remote, keep, coordinator
        self._since = since
        self._copying: set[int] = set()
        self._closing = False
        self.finished: queue.SimpleQueue[Saved] = queue.SimpleQueue()
        """The rounds that have ended and were not collected yet."""
        self._rounds = Worker("copies", self._fail)

    def copying(self) -> Iterable[int]:
        """Return the steps whose checkpoints must not be removed now."""
        return tuple(self._copying)

    def copy(self, step: int) -> None:
        """Note that the checkpoint of that step has been written."""
        self._rounds.put(lambda: self._round(step))

    def went_back(self, step: int) -> None:
        """Note that the run continues from that step.

        Later steps are written again, and may differ from their copies in the mirror.
        """

        def set_back() -> None:
            self._since = min(self._since, step)

        self._rounds.put(set_back)

    def close(self, patience_s: float) -> None:
        """Finish the rounds that are due, but wait no longer than `patience_s` seconds. Further calls do nothing."""
        self._closing = True
        self._rounds.close(patience_s)

    def _fail(self, error: Exception) -> bool:
        """End the copying after an error of a collective: a rank did not come, or came too late."""
        reason = " ".join(str(error).split()) or type(error).__name__
        told = f"checkpoint.mirror_to={self._remote.url}: ranks are out of step, nothing is copied until the next start"
        log.log(logging.INFO if self._closing else logging.WARNING, "%s: %s", told, reason)
        return False

    def _round(self, step: int) -> None:
        start, url = time.perf_counter(), self._remote.url
        reason = "ranks are out of step"
        try:
            steps = mirror(self._folder, step, self._since, self._remote, self._keep, self._coordinator, self._copying)
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
