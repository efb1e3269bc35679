"""ledger.jsonl: what was decided in a run, when, and on what evidence.

    run_start, resume       what the process started from
    detectors               thresholds, policy and surroundings in force from here on (`policy.in_force`)
    stage_start             all the stage's settings
    alarm, alarm_cleared    a detector's finding and its end (`Alarm.evidence`); `step` is the step that was judged
    decision                what was done about a step, where that was more than a warning (`Decision.evidence`)
    rewind                  `to`: step of the checkpoint that the run went back to
    checkpoint, checkpoint_skipped, run_end

`step` of the others is the last step done. A line is on disk before `write` returns, and is never changed afterwards: a resumed
run appends, and what was decided in steps that a resume or a rewind has undone stays.
"""

import logging
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steptron.monitor import lines

FILE_NAME = "ledger.jsonl"

log = logging.getLogger(__name__)


class Ledger:
    """Writes decisions. A disk that takes no more is warned of once; the run does not end for it."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / FILE_NAME
        self._failed = False

    def write(self, event: str, step: int, **evidence: Any) -> None:
        """Append one decision.

        Args:
            event: its kind, in snake_case.
            step: the last step done when it was taken.
            evidence: what it rests on; anything JSON can hold, frozen recipe values, NumPy scalars.
        """
        assert "time" not in evidence, "the ledger puts the time in by itself"
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = lines.dump({"time": time, "event": event, "step": step, **evidence})
        size: int | None = None
        try:
            size = self._path.stat().st_size if self._path.exists() else 0
            with lines.open_to_append(self._path) as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if size is not None:
                with suppress(OSError):  # a full disk takes the first part of a line
                    os.truncate(self._path, size)
            if not self._failed:
                log.warning("%s cannot be written (%s); the run goes on without it", self._path, error)
            self._failed = True


def read(run_dir: Path) -> list[dict[str, Any]]:
    """All decisions of a run, in the order they were taken; a line cut short by a crash is left out."""
    return list(lines.read(run_dir / FILE_NAME))
