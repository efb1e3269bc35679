"""The combination of the planes of many ranks, which may have different registries, each with the cells of its rank.

    rank 0: peak[layer 0–5, expert 0–35] ─┐
    rank 1: peak[layer 0–5, expert 36–71] ─┼─► peak[layer 0–11, expert 0–71]
    rank 2: peak[layer 6–11, expert 0–35] ─┘

Cells are matched by name and coordinates. The destination of each cell is computed once, as slices of the merged grid
if it is regular. A step then takes a few copies per rank, or additions if ranks share cells.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steptron.monitor.statistics.reduction import RULES, Reduction
from steptron.monitor.statistics.registry import Registry, Statistic

MAX_SLOTS = 1 << 26
"""The largest number of values in a plane, of one rank or of all ranks together."""


class MismatchError(Exception):
    """Raised if the registries of ranks cannot be combined; the message gives the reason."""


@dataclass(frozen=True, kw_only=True)
class MergedCells:
    """The destination of one statistic of a rank."""

    name: str
    source: slice
    """The slots of the statistic in the rank's plane."""
    shape: tuple[int, ...]
    """The shape of the rank's grid."""
    target: slice
    """The slots of the complete statistic in the merged plane."""
    target_shape: tuple[int, ...]
    """The shape of the merged grid."""
    index: tuple[Any, ...]
    """The rank's cells in the merged grid: slices, or the result of `np.ix_`."""
    reduction: Reduction

    def cells(self, plane: np.ndarray) -> np.ndarray:
        """Return the rank's cells of a merged plane; a view if the index consists of slices."""
        return plane[self.target].reshape(self.target_shape)[self.index]

    def put(self, plane: np.ndarray, value: Any) -> None:
        """Set the rank's cells of a merged plane."""
        plane[self.target].reshape(self.target_shape)[self.index] = value

    def reduce(self, plane: np.ndarray, frame: np.ndarray) -> None:
        """Reduce the rank's values into a merged plane that already has values."""
        values = frame[self.source].reshape(self.shape)
        self.put(plane, RULES[self.reduction].combine(self.cells(plane), values))

    def copy(self, plane: np.ndarray, frame: np.ndarray) -> None:
        """Copy the rank's values into a merged plane, in which no other rank has these cells."""
        self.put(plane, frame[self.source].reshape(self.shape))


class Merged:
    """A registry of all ranks' cells, and the destination of each rank's values in its plane."""

    def __init__(self, members: Mapping[int, Registry]):
        """Lay out the merged plane. Raises `MismatchError` if it would be too large."""
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
            (slots, RULES[self.registry.statistics[name].reduction].nothing)
            for name, slots in slices.items()
            if name in self._shared
        ]
        self._complete = bool((holders > 0).all())
        self._absent: dict[frozenset[int], np.ndarray | None] = {}

    def reduce(self, frames: Sequence[tuple[int, np.ndarray]], plane: np.ndarray) -> None:
        """Fill a merged plane from ranks' frames; cells of other ranks are not changed."""
        for slots, empty in self._start:
            plane[slots] = empty
        for rank, frame in frames:
            for piece in self._pieces[rank]:
                if piece.name in self._shared:
                    piece.reduce(plane, frame)
                else:
                    piece.copy(plane, frame)

    def places(self, rank: int) -> np.ndarray:
        """Return the merged plane's slot for each slot of a rank's plane, int64 [slots of the rank]."""
        slots = np.arange(self.registry.slots)
        places = np.empty(self.members[rank].slots, dtype=np.int64)
        for piece in self._pieces[rank]:
            places[piece.source] = piece.cells(slots).ravel()
        return places

    def absent(self, ranks: Collection[int]) -> np.ndarray | None:
        """Return the cells that none of `ranks` has, bool [slots]; None if there are none."""
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
    """Raise `MismatchError` if a name has another meaning in the registry of another rank."""
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
    """Return a registry in which every statistic covers the axis values of all registries; vital ones come first."""
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
                union.derive(name, unit=derived.unit, powers=dict(derived.powers))
    return union


def _piece(own: Statistic, merged: Statistic) -> MergedCells:
    """Return the destination of a rank's statistic in the merged one."""
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
    """Return slices if all positions are evenly spaced, else an open mesh."""
    slices = []
    for position in positions:
        steps = np.diff(position)
        stride = int(steps[0]) if len(steps) else 1
        if stride < 1 or (steps != stride).any():
            return np.ix_(*positions)
        slices.append(slice(int(position[0]), int(position[-1]) + 1, stride))
    return tuple(slices)
