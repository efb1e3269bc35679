"""Puts the planes of many ranks together: ranks may have different registries, each the cells that it holds.

    rank 0: peak[layer 0–5, expert 0–35] ─┐
    rank 1: peak[layer 0–5, expert 36–71] ─┼─► peak[layer 0–11, expert 0–71]
    rank 2: peak[layer 6–11, expert 0–35] ─┘

By name and cell. Where each cell of a rank goes is worked out once, as slices of the merged grid wherever that is
regular; a step is then a few copies a rank, or additions where ranks share cells.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steptron.monitor.statistics.registry import Registry, Statistic

_REDUCE = {"sum": np.add, "max": np.maximum, "min": np.minimum}
_EMPTY = {"sum": 0.0, "max": -np.inf, "min": np.inf}


MAX_SLOTS = 1 << 26
"""The most values that a plane of one rank, or of all ranks together, may have."""


class MismatchError(Exception):
    """Registries of ranks that cannot be put together; the message says why."""


@dataclass(frozen=True, kw_only=True)
class MergedCells:
    """Where one statistic of a rank goes."""

    name: str
    source: slice
    """In the rank's plane."""
    shape: tuple[int, ...]
    """The shape of the rank's grid."""
    target: slice
    """The whole statistic in the merged plane."""
    target_shape: tuple[int, ...]
    """The shape of the merged grid."""
    index: tuple[Any, ...]
    """The rank's cells in the merged grid: slices, or the result of `np.ix_`."""
    reduction: str

    def cells(self, plane: np.ndarray) -> np.ndarray:
        """The rank's cells of a merged plane; a view where the index is made of slices."""
        return plane[self.target].reshape(self.target_shape)[self.index]

    def put(self, plane: np.ndarray, value: Any) -> None:
        """Set the rank's cells of a merged plane."""
        plane[self.target].reshape(self.target_shape)[self.index] = value

    def reduce(self, plane: np.ndarray, frame: np.ndarray) -> None:
        """Reduce the rank's values into a merged plane that has some already."""
        values = frame[self.source].reshape(self.shape)
        self.put(plane, _REDUCE[self.reduction](self.cells(plane), values))

    def copy(self, plane: np.ndarray, frame: np.ndarray) -> None:
        """Copy the rank's values into a merged plane, where it alone has these cells."""
        self.put(plane, frame[self.source].reshape(self.shape))


class Merged:
    """A registry of all ranks' cells, and the way of each rank's values into its plane."""

    def __init__(self, members: Mapping[int, Registry]):
        """Lay out the merged plane. Raises `MismatchError` where it would be too large."""
        self.members = dict(members)
        self.registry = _union(list(members.values()))
        if self.registry.slots > MAX_SLOTS:
            raise MismatchError(f"the ranks' cells put together are more than {MAX_SLOTS} slots")
        self._pieces = {
            rank: [_piece(statistic, self.registry.statistics[name]) for name, statistic in own.statistics.items()]
            for rank, own in members.items()
        }
        holders = np.zeros(self.registry.slots, np.uint16)
        for piece in (piece for pieces in self._pieces.values() for piece in pieces):
            piece.put(holders, piece.cells(holders) + 1)
        slices = {
            name: slice(statistic.first, statistic.first + statistic.count)
            for name, statistic in self.registry.statistics.items()
        }
        self._shared = {name for name, slots in slices.items() if (holders[slots] > 1).any()}
        self._start = [
            (slots, _EMPTY[self.registry.statistics[name].reduction])
            for name, slots in slices.items()
            if name in self._shared
        ]
        self._complete = bool((holders > 0).all())
        self._absent: dict[frozenset[int], np.ndarray | None] = {}

    def reduce(self, frames: Sequence[tuple[int, np.ndarray]], plane: np.ndarray) -> None:
        """Fill a merged plane from ranks' frames; cells of ranks that are not among them are left as they are."""
        for slots, empty in self._start:
            plane[slots] = empty
        for rank, frame in frames:
            for piece in self._pieces[rank]:
                if piece.name in self._shared:
                    piece.reduce(plane, frame)
                else:
                    piece.copy(plane, frame)

    def places(self, rank: int) -> np.ndarray:
        """Where each slot of a rank's plane goes in a merged one, int64 [slots of the rank]."""
        slots = np.arange(self.registry.slots)
        places = np.empty(self.members[rank].slots, dtype=np.int64)
        for piece in self._pieces[rank]:
            places[piece.source] = piece.cells(slots).ravel()
        return places

    def absent(self, ranks: Collection[int]) -> np.ndarray | None:
        """Cells that none of `ranks` has, bool [slots]. None: there are none."""
        key = frozenset(ranks)
        if key not in self._absent:
            if len(self._absent) > 16:
                self._absent.clear()
            self._absent[key] = self._find_absent(key)
        return self._absent[key]

    def _find_absent(self, ranks: frozenset[int]) -> np.ndarray | None:
        if self._complete and ranks == self.members.keys():
            return None
        absent = np.ones(self.registry.slots, bool)
        for piece in (piece for rank in ranks for piece in self._pieces[rank]):
            piece.put(absent, False)
        return absent if absent.any() else None


def check_match(registry: Registry, others: Mapping[int, Registry]) -> None:
    """Raises `MismatchError` where another rank means something else by one of the statistics' names."""
    for rank, other in others.items():
        for name in (registry.derived.keys() & other.statistics) | (registry.statistics.keys() & other.derived):
            raise MismatchError(f"{name!r} is derived here or on rank {rank}, and a statistic on the other")
        for name, statistic in registry.statistics.items():
            if name in other.statistics and _meaning(statistic) != _meaning(other.statistics[name]):
                one, two = _meaning(statistic), _meaning(other.statistics[name])
                raise MismatchError(f"statistic {name!r} is {one} here, and {two} on rank {rank}")


def _meaning(statistic: Statistic) -> tuple[str, str, bool, list[str], list[type]]:
    kinds = [type(axis.values[0]) for axis in statistic.grid]
    return statistic.reduction, statistic.unit, statistic.vital, [axis.name for axis in statistic.grid], kinds


def _union(registries: Sequence[Registry]) -> Registry:
    """Every statistic over all values that any of the registries has on each axis; vital statistics first."""
    found: dict[str, list[Statistic]] = {}
    for registry in registries:
        for name, statistic in registry.statistics.items():
            found.setdefault(name, []).append(statistic)
    union = Registry()
    for same in sorted(found.values(), key=lambda same: not same[0].vital):
        axes = {}
        for axes_here in zip(*(statistic.grid for statistic in same), strict=True):
            values = dict.fromkeys(
                value for axis in {axis.values: axis for axis in axes_here}.values() for value in axis.values
            )
            axes[axes_here[0].name] = sorted(values) if isinstance(axes_here[0].values[0], int) else list(values)
        first = same[0]
        union.add(first.name, unit=first.unit, reduction=first.reduction, axes=axes, vital=first.vital)
    for registry in registries:
        for name, derived in registry.derived.items():
            grids = {union.statistics[column].grid for column, _ in derived.powers}
            if name not in union.derived and len(grids) == 1:
                union.derive(name, unit=derived.unit, powers=dict(derived.powers), scale=derived.scale)
    return union


def _piece(own: Statistic, merged: Statistic) -> MergedCells:
    """The way of a rank's statistic into the merged one."""
    positions = []
    for mine, every in zip(own.grid, merged.grid, strict=True):
        place = {value: position for position, value in enumerate(every.values)}
        positions.append(np.array([place[value] for value in mine.values]))
    return MergedCells(
        name=own.name,
        source=slice(own.first, own.first + own.count),
        shape=own.shape,
        target=slice(merged.first, merged.first + merged.count),
        target_shape=merged.shape,
        index=_index(positions),
        reduction=own.reduction,
    )


def _index(positions: list[np.ndarray]) -> tuple[Any, ...]:
    """Slices where all positions are evenly spaced, else an open mesh."""
    slices = []
    for position in positions:
        steps = np.diff(position)
        stride = int(steps[0]) if len(steps) else 1
        if stride < 1 or (steps != stride).any():
            return np.ix_(*positions)
        slices.append(slice(int(position[0]), int(position[-1]) + 1, stride))
    return tuple(slices)
