"""A limit on the rows sent to W&B: values and rows per minute, and the number of names, as W&B advises.

There is one bucket per limit, which fills at an even rate. A quarter of a minute's allowance may be sent at once, the
rest over the minute, so that no minute, whenever it begins, exceeds the limit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_VALUES = 100_000
"""The number of values per minute."""
MAX_ROWS = 1_000
"""The number of rows per minute."""
MAX_NAMES = 100_000
"""The number of metric names of a project."""
_BURST = 0.25


@dataclass
class _Bucket:
    """The amount that may still be sent."""

    size: float
    rate: float
    level: float
    at: float

    def fill(self, now: float) -> None:
        self.level = min(self.size, self.level + (now - self.at) * self.rate)
        self.at = now


class RateLimiter:
    """Decides which values may be sent now."""

    def __init__(
        self,
        clock: Callable[[], float],
        max_values: int = MAX_VALUES,
        max_rows: int = MAX_ROWS,
        max_names: int = MAX_NAMES,
    ):
        self._clock = clock
        self._names: set[str] = set()
        self._max_names = max_names
        now = clock()
        self._values, self._rows = (
            _Bucket(limit * _BURST, limit * (1 - _BURST) / 60, limit * _BURST, now) for limit in (max_values, max_rows)
        )

    def has_room(self, values: int) -> bool:
        """Return whether a row of so many values may be sent now."""
        now = self._clock()
        self._values.fill(now)
        self._rows.fill(now)
        return self._rows.level >= 1 and self._values.level >= values

    def take(self, *parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return as many of the parts as may be sent now, in order, each complete, as one row. The row may be empty.

        A name that would be one too many in total is left out by itself.
        """
        row: dict[str, Any] = {}
        if not self.has_room(0):
            return row
        for part in parts:
            if len(row) + len(part) > self._values.level:
                break
            row |= {name: value for name, value in part.items() if self._known(name)}
        if row:
            self._rows.level -= 1
            self._values.level -= len(row)
        return row

    def _known(self, name: str) -> bool:
        if name not in self._names and len(self._names) < self._max_names:
            self._names.add(name)
        return name in self._names
