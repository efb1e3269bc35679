"""metrics.jsonl: one line per step, all scalars at full float precision, readable by anything.

    write ─► waiting lines ─► file     as soon as the disk accepts them: at once, or when there is room again

Lines that a full disk does not accept wait in memory. A step is missing only if the process ends before there is room.
"""

import logging
import math
import os
from collections import deque
from contextlib import suppress
from pathlib import Path

from steptron.monitor.statistics.frame import Alert, Frame
from steptron.monitor.storage import jsonl

FILE_NAME = "metrics.jsonl"

MAX_WAITING = 20_000
"""The number of lines, of about 1 KB, that wait while the disk accepts none. Beyond it the oldest are dropped."""

log = logging.getLogger("steptron")


class JsonlSink:
    """Appends one line per step and passes it to the operating system at once, so that a killed process loses none."""

    def __init__(self, run_dir: Path):
        """Open the file and cut off an incomplete last line that a crash left. Raises OSError."""
        self._path = run_dir / FILE_NAME
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._forget: int | None = None
        self._behind = False
        self._dropped = 0
        self._open()

    def write(self, frame: Frame) -> None:
        """Append the step's scalars, `tokens_by_source` last."""
        line = jsonl.dump({**frame.metrics, "tokens_by_source": dict(frame.tokens_by_source)})
        self._waiting.append((frame.step, line.encode()))
        self._catch_up()
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
            self._dropped += 1

    def alert(self, alert: Alert) -> None:
        """Do nothing: nobody is notified through this file."""

    def flush(self) -> None:
        """Sync the file to the disk.

        If the disk accepts no lines, warn which steps a run that is resumed from here will lack.
        """
        self._catch_up()
        if self._waiting:
            log.warning("%s has no line of %s at this checkpoint", self._path, self._steps())
        os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, and incomplete lines."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting[0] <= step)
        self._forget = step if self._forget is None else min(step, self._forget)
        self._catch_up()

    def close(self) -> None:
        """Close the file."""
        self._catch_up()
        if self._waiting:
            log.warning("%s will never have a line of %s: the disk has not taken it", self._path, self._steps())
        self._file.close()

    def _open(self) -> None:
        self._file = self._path.open("ab", buffering=0)
        ends = (end for end, line in jsonl.backwards(self._path) if line.endswith(b"\n"))
        self._whole = next(ends, 0)

    def _catch_up(self) -> None:
        """Make the pending changes to the file, as far as the disk accepts them."""
        try:
            if self._forget is not None:
                self._cut(self._forget)
                self._forget = None
            while self._waiting:
                self._append(self._waiting[0][1])
                self._waiting.popleft()
        except OSError as error:
            if not self._behind:
                log.warning(
                    "%s cannot be written: %s; training continues, and up to %d lines wait for room",
                    *(self._path, error, MAX_WAITING),
                )
            self._behind = True
            return
        if self._behind:
            lost = f", but for the {self._dropped} oldest lines" if self._dropped else ""
            log.warning("%s is written again, and complete%s", self._path, lost)
        self._behind, self._dropped = False, 0

    def _append(self, line: bytes) -> None:
        """Append one complete line, or nothing. Raises OSError."""
        file, left = self._file, memoryview(line)
        if (
            os.fstat(file.fileno()).st_size > self._whole
        ):  # half a line, from a crash or from a disk that could not be truncated either
            os.ftruncate(file.fileno(), self._whole)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), self._whole)
            raise
        self._whole += len(line)

    def _cut(self, step: int) -> None:
        """Drop the lines of later steps in one operation: a crash leaves the old file or the new one. Raises OSError.

        Steps rise in the file, so it is read backwards, only as far as it is cut.
        """
        self._whole = next((end for end, line in jsonl.backwards(self._path) if _step(line) <= step), 0)
        os.ftruncate(self._file.fileno(), self._whole)
        os.fsync(self._file.fileno())

    def _steps(self) -> str:
        first, last = self._waiting[0][0], self._waiting[-1][0]
        dropped = f", nor of {self._dropped} before" if self._dropped else ""
        return (f"steps {first} to {last}" if first < last else f"step {first}") + dropped


def _step(line: bytes) -> float:
    """Return the step of a line; infinity if the line is incomplete."""
    row = jsonl.parse(line)
    return math.inf if row is None else row.get("step", math.inf)
