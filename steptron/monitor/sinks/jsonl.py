"""metrics.jsonl: a line a step, all scalars at full float precision, readable by anything."""

import math
import os
from pathlib import Path

from steptron.monitor import lines
from steptron.monitor.frame import Alert, Frame

FILE_NAME = "metrics.jsonl"


class JsonlSink:
    """Appends a line a step and hands it to the operating system at once, so that a killed process loses none."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / FILE_NAME
        self._file = lines.open_to_append(self._path)

    def write(self, frame: Frame) -> None:
        """Append the step's scalars, `tokens_by_source` last."""
        self._file.write(lines.dump({**frame.metrics, "tokens_by_source": dict(frame.tokens_by_source)}))
        self._file.flush()

    def alert(self, alert: Alert) -> None:
        """Nobody reads this file at night."""

    def flush(self) -> None:
        """Put the lines on the disk itself."""
        os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, and torn ones, in one go: a crash leaves the old file or the new one."""
        self._file.close()
        temporary = self._path.with_suffix(".tmp")
        with self._path.open("rb") as old, temporary.open("wb") as new:
            for line in old:
                row = lines.parse(line)
                if row is not None and row.get("step", math.inf) <= step:
                    new.write(line)
            new.flush()
            os.fsync(new.fileno())
        temporary.replace(self._path)
        self._file = lines.open_to_append(self._path)

    def close(self) -> None:
        """End the file."""
        self._file.close()
