"""Downsampling of long runs for charts: steps are collected in buckets that do not cross stage boundaries.

scalars   ─► edges of buckets ─► mean, minimum and maximum by bucket
the plane ─► arrays by step ───► `Spans`, which grow coarser as the run grows longer
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from steptron.monitor.statistics.reduction import OVER_STEPS, OverSteps

Series = dict[str, tuple[OverSteps, np.ndarray]]
"""Arrays by name, each with the reduction that combines values of several steps."""


def spans(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the runs of equal names, as (name, start, stop)."""
    result: list[tuple[str, int, int]] = []
    start = 0
    for position in range(1, len(names) + 1):
        if position == len(names) or names[position] != names[start]:
            result.append((names[start], start, position))
            start = position
    return result


def edges(names: Sequence[str], limit: int) -> np.ndarray:
    """Return the borders of at most `limit` buckets of about equal size, and one more for each change of name.

    Args:
        names: stage of each row.
        limit: number of buckets wanted.

    Returns:
        int64 [buckets + 1]: bucket b is rows edges[b] to edges[b + 1].
    """
    size = max(1, -(-len(names) // limit))
    borders = [0]
    for _, start, stop in spans(names):
        borders += [*range(start + size, stop, size), stop]
    return np.array(borders, dtype=np.int64)


def summarise(values: np.ndarray, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, minimum and maximum of the finite values by bucket, float64 [buckets] each. NaN if there are
    none."""
    finite = np.isfinite(values)
    starts = borders[:-1]
    counts = np.add.reduceat(finite, starts, dtype=np.int64)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.add.reduceat(np.where(finite, values, 0.0), starts) / counts
    lows = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
    highs = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
    empty = counts == 0
    means[empty] = lows[empty] = highs[empty] = np.nan
    return means, lows, highs


def median(values: np.ndarray) -> np.ndarray:
    """Return the median of the finite values along the last axis. NaN if there are none (NumPy's own would warn)."""
    ordered = np.sort(np.where(np.isfinite(values), values, np.nan), axis=-1)  # NaN last
    count = np.isfinite(ordered).sum(axis=-1, keepdims=True)
    low, high = (np.take_along_axis(ordered, at, axis=-1) for at in (np.maximum(count - 1, 0) // 2, count // 2))
    return ((low + high) / 2)[..., 0]


def spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return max/median and min/median along the last axis. NaN if nothing is known, or if the median is 0."""
    known = np.where(np.isfinite(values), values, np.nan)
    middle = median(known)
    with np.errstate(divide="ignore", invalid="ignore"):
        high, low = np.fmax.reduce(known, axis=-1) / middle, np.fmin.reduce(known, axis=-1) / middle
    return np.where(np.isfinite(high), high, np.nan), np.where(np.isfinite(low), low, np.nan)


class Spans:
    """Arrays by span of steps: each span has `stride` steps and stays within a stage; there are about `limit` at most.

    If there are more, the stride doubles and neighbours are combined. Steps may come in any order, so that a long run
    can be read coarsely first; the result depends only on the steps.
    """

    def __init__(self, limit: int, stride: int = 1):
        self.stride = stride
        self._limit = limit
        self._spans: dict[tuple[int, int], Span] = {}

    def add(self, steps: np.ndarray, stages: np.ndarray, values: Mapping[str, tuple[OverSteps, np.ndarray]]) -> None:
        """Add steps.

        Args:
            steps: int [S], ascending.
            stages: int [S], the position of each step's stage in the run, ascending.
            values: by name, the reduction and an array whose first dim is S. NaN: not known.
        """
        if len(steps) == 0:
            return
        keys = np.stack([stages, steps // self.stride])
        starts = np.flatnonzero(np.diff(keys, prepend=-1).any(axis=0))
        for start, stop in pairwise([*starts.tolist(), len(steps)]):
            part: Series = {name: (kind, OVER_STEPS[kind](rows[start:stop])) for name, (kind, rows) in values.items()}
            self._put(
                (int(stages[start]), int(steps[start]) // self.stride),
                Span(int(steps[start]), int(steps[stop - 1]), part),
            )
        while len(self._spans) > 2 * self._limit + len({stage for stage, _ in self._spans}):
            self._coarsen()

    def copy(self) -> "Spans":
        """Return a copy to which steps can be added. The arrays are shared, because they are never changed."""
        other = Spans(self._limit, self.stride)
        other._spans = dict(self._spans)
        return other

    def in_order(self) -> list[tuple[int, "Span"]]:
        """Return the position of the stage, and the span, from first to last."""
        return [(key[0], self._spans[key]) for key in sorted(self._spans)]

    def _put(self, key: tuple[int, int], span: "Span") -> None:
        self._spans[key] = self._spans[key].joined(span) if key in self._spans else span

    def _coarsen(self) -> None:
        old, self._spans = self._spans, {}
        self.stride *= 2
        for (stage, position), span in sorted(old.items()):
            self._put((stage, position // 2), span)


@dataclass(frozen=True)
class Span:
    """The data of some steps."""

    first: int
    """The first step in it."""
    last: int
    """The last step in it."""
    values: Mapping[str, tuple[OverSteps, np.ndarray]]
    """Arrays by name, reduced over its steps."""

    def joined(self, other: "Span") -> "Span":
        """Return both spans combined."""
        values: Series = {
            name: (kind, OVER_STEPS[kind](np.stack([mine, other.values[name][1]])))
            for name, (kind, mine) in self.values.items()
        }
        return Span(min(self.first, other.first), max(self.last, other.last), values)
