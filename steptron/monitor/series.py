"""Long runs made short enough to draw: steps gathered in buckets, none of which reaches across a stage boundary.

metrics rows ─► columns (arrays by key) ─► edges of buckets ─► mean, minimum and maximum by key and bucket
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One scalar over all rows, float64 [rows]; NaN where it is missing or no number."""
    values = (row.get(key) for row in rows)
    return np.array([value if isinstance(value, (int, float)) else np.nan for value in values], dtype=np.float64)


def spans(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Runs of equal names, as (name, start, stop)."""
    result: list[tuple[str, int, int]] = []
    start = 0
    for position in range(1, len(names) + 1):
        if position == len(names) or names[position] != names[start]:
            result.append((names[start], start, position))
            start = position
    return result


def edges(names: Sequence[str], limit: int) -> np.ndarray:
    """Borders of at most `limit` buckets of about equal size (one more for each change of name).

    Args:
        names: stage of each row.
        limit: buckets wanted.

    Returns:
        int64 [buckets + 1]: bucket b is rows edges[b] to edges[b + 1].
    """
    size = max(1, -(-len(names) // limit))
    borders = [0]
    for _, start, stop in spans(names):
        borders += [*range(start + size, stop, size), stop]
    return np.array(borders, dtype=np.int64)


def summarise(values: np.ndarray, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, minimum and maximum of the finite values by bucket, NaN where there are none; float64 [buckets] each."""
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
