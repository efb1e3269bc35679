"""metrics.jsonl as columns, read incrementally while it grows.

Each key is one array of numbers, so that a hundred thousand steps take little memory. A step that is written again (in
a resumed or rewound run) replaces the old one and all steps after it.
"""

import math
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steptron.monitor.storage import jsonl


class MetricsTable:
    """The steps of one run."""

    def __init__(self, path: Path):
        self._path = path
        self._offset = 0
        self._file: Any = None
        self._tail = b""
        """The last line that was read; it shows whether the file was cut and has grown again since."""
        self.steps = array("q")
        """The step numbers, rising."""
        self.stages: list[str] = []
        """The stage of each step."""
        self.revision = 0
        """A number that grows with every change."""
        self._columns: dict[str, array] = {}
        self._sources: dict[str, array] = {}

    def poll(self) -> None:
        """Read the complete lines that were appended; read everything if the file was replaced or cut."""
        try:
            with self._path.open("rb") as file:
                identity = os.fstat(file.fileno()).st_ino
                file.seek(max(0, self._offset - len(self._tail)))
                if self._file != identity or file.read(len(self._tail)) != self._tail:
                    self._truncate(0)
                    self._file, self._offset, self._tail = identity, 0, b""
                    self.revision += 1
                    file.seek(0)
                self._read(file)
        except OSError:
            return

    def _read(self, lines_left: Iterable[bytes]) -> None:
        for line in lines_left:
            if not line.endswith(b"\n"):
                break
            self._offset += len(line)
            self._tail = line
            row = jsonl.parse(line)
            if row is not None and isinstance(row.get("step"), int):
                self._append(row)
                self.revision += 1

    def column(self, key: str) -> np.ndarray:
        """Return one scalar over all steps, float64. NaN where it is missing."""
        column = np.full(len(self.steps), np.nan)
        known = self._columns.get(key, ())
        column[: len(known)] = known
        return column

    def value(self, key: str, position: int) -> float | None:
        """Return one scalar of one step, or None if it is missing."""
        column = self._columns.get(key, ())
        at = position + len(self.steps) if position < 0 else position
        value = column[at] if 0 <= at < len(column) else math.nan
        return value if math.isfinite(value) else None

    def sources(self, start: int, stop: int) -> dict[str, int]:
        """Return the tokens by source, summed over the steps at positions start to stop − 1."""
        sums = {name: int(np.nansum(np.array(column[start:stop]))) for name, column in self._sources.items()}
        return {name: tokens for name, tokens in sums.items() if tokens}

    def _append(self, row: dict[str, Any]) -> None:
        step = row.pop("step")
        if self.steps and step <= self.steps[-1]:
            self._truncate(int(np.searchsorted(np.array(self.steps), step)))
        by_source = row.pop("tokens_by_source", None)
        _extend(self._columns, row, len(self.steps))
        _extend(self._sources, by_source if isinstance(by_source, dict) else {}, len(self.steps))
        self.steps.append(step)
        self.stages.append(str(row.get("stage", "")))

    def _truncate(self, length: int) -> None:
        for column in (self.steps, self.stages, *self._columns.values(), *self._sources.values()):
            del column[length:]


def _extend(columns: dict[str, array], row: dict[str, Any], length: int) -> None:
    """Append the numbers of a row to columns of `length` rows; a column without a number in this row stays shorter."""
    for key, value in row.items():
        if (
            type(value) is float or type(value) is int
        ):  # a bool is not a number; this line runs for each number of a long file
            column = columns.get(key)
            if column is None:
                column = columns[key] = array("d")
            if len(column) < length:
                column.extend([math.nan] * (length - len(column)))
            column.append(value)


def starts(steps: Sequence[int], spans: Sequence[tuple[str, int, int]]) -> list[int]:
    """Return the first step of each run of steps of one stage (see `downsample.spans`)."""
    return [steps[start] for _, start, _ in spans]
