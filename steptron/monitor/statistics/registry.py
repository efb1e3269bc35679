"""The meaning of each slot of the metrics plane.

The plane is one flat float32 array per step and rank. Each statistic owns a range of its slots: the cells of a grid, in
row-major order. A grid is a tuple of named axes, such as (layer, expert); its axes' names, joined, are the name of its
table.

The content of a slot adds up: a sum or a maximum over tokens, micro-batches and ranks (`reduction`). Means, norms and
ratios are made of sums at the very end, by derived statistics, which are products of powers of columns of one grid:

    activation_rms = h_square_sum^½ · elements^−½

A value therefore never depends on how a batch was cut, or on how many ranks share a cell.

    vital statistics ─┐ the front of the plane, reduced over all ranks; detectors read it, rank 0 stores it
    the others ───────┴ this rank's own; every rank stores its own, readers combine them
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np

from steptron.monitor.statistics import reduction as reductions
from steptron.monitor.statistics.reduction import Reduction

VERSION = 3
"""The version of the form that `to_dict` gives."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""The pattern of names of statistics and axes. They become columns and folders."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a grid."""

    name: str
    """The name: `layer`, `expert` or another. It is a column of the table."""
    values: tuple[int | str, ...]
    """The meaning of its positions: global layer indices, expert numbers, parameter names."""


Grid = tuple[Axis, ...]


def table_name(grid: Grid) -> str:
    """Return `layer_expert` for (layer, expert), and `run` for the grid without axes."""
    return "_".join(axis.name for axis in grid) or "run"


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """A named range of slots."""

    name: str
    """The column of its grid's table. It is unique."""
    unit: str
    """The unit of the values, as people write it."""
    reduction: Reduction
    """The operation that combines values of micro-batches and ranks."""
    grid: Grid
    """The axes, slowest first."""
    first: int
    """The number of its first slot."""
    vital: bool
    """True if it is in the front of the plane, which is summed over all ranks in every step."""

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Return the number of cells by axis."""
        return tuple(len(axis.values) for axis in self.grid)

    @cached_property
    def count(self) -> int:
        """Return the number of slots that it owns."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A derived statistic: Π column^power, cell by cell. All columns are of one grid."""

    name: str
    """The column of the grid's view. It is unique, also among statistics."""
    unit: str
    """The unit of the values."""
    powers: tuple[tuple[str, float], ...]
    """Statistics and their powers."""


class Registry:
    """The layout of the plane: filled at start-up, then only read."""

    def __init__(self) -> None:
        self.statistics: dict[str, Statistic] = {}
        self.derived: dict[str, Derived] = {}
        self.slots = 0
        """The length of the plane."""

    @property
    def vital_slots(self) -> int:
        """Return the length of the front that is summed over all ranks."""
        return sum(statistic.count for statistic in self.statistics.values() if statistic.vital)

    def add(
        self,
        name: str,
        *,
        unit: str,
        reduction: Reduction,
        axes: Mapping[str, Sequence[int | str]],
        vital: bool = False,
    ) -> Statistic:
        """Give a statistic the next free slots. `axes`: the meaning of the positions by axis name, slowest first."""
        self._check_new(name)
        assert not vital or reduction == "sum", f"vital statistics are sums, {name!r} is a {reduction}"
        assert not vital or self.slots == self.vital_slots, f"vital statistics come first, {name!r} comes after others"
        grid = tuple(Axis(name=axis, values=tuple(values)) for axis, values in axes.items())
        statistic = Statistic(name=name, unit=unit, reduction=reduction, grid=grid, first=self.slots, vital=vital)
        self.statistics[name] = statistic
        self.slots += statistic.count
        return statistic

    def derive(self, name: str, *, unit: str, powers: Mapping[str, float]) -> None:
        """Define the derived statistic `name` for readers: Π statistic^power."""
        self._check_new(name)
        grids = {self.statistics[column].grid for column in powers}
        assert len(grids) == 1, f"{name!r} is made of statistics on {len(grids)} grids; it needs one"
        self.derived[name] = Derived(name=name, unit=unit, powers=tuple(powers.items()))

    def _check_new(self, name: str) -> None:
        assert name not in self.statistics, f"statistic {name!r} is registered twice"
        assert name not in self.derived, f"statistic {name!r} is derived already"

    def grids(self) -> dict[Grid, list[Statistic]]:
        """Return the statistics by grid, both in the order of registration."""
        grids: dict[Grid, list[Statistic]] = {}
        for statistic in self.statistics.values():
            grids.setdefault(statistic.grid, []).append(statistic)
        return grids

    def grid_of(self, name: str) -> Grid:
        """Return the axes of a statistic, plain or derived."""
        if name in self.derived:
            name = self.derived[name].powers[0][0]
        return self.statistics[name].grid

    def __contains__(self, name: str) -> bool:
        """Return whether a statistic, plain or derived, has this name."""
        return name in self.statistics or name in self.derived

    def new_plane(self) -> np.ndarray:
        """Return a plane without values: NaN, float32 [slots]."""
        return np.full(self.slots, np.nan, dtype=np.float32)

    def view(self, plane: Any, name: str) -> Any:
        """Return one statistic's part of a plane (NumPy or torch), shaped like its grid. It shares the plane's
        memory."""
        statistic = self.statistics[name]
        return plane[statistic.first : statistic.first + statistic.count].reshape(statistic.shape)

    def values(self, plane: np.ndarray, name: str) -> np.ndarray:
        """Return a statistic, plain or derived, shaped like its grid; NaN where it would divide by 0."""
        if name in self.statistics:
            return self.view(plane, name)
        exact = reductions.derived(self.derived[name].powers, lambda column: self.view(plane, column))
        return exact.astype(np.float32)

    def own(self) -> "Registry":
        """Return the registry without the vital statistics: the part that ranks other than the first store."""
        registry = Registry()
        for statistic in self.statistics.values():
            if not statistic.vital:
                axes = {axis.name: axis.values for axis in statistic.grid}
                registry.add(statistic.name, unit=statistic.unit, reduction=statistic.reduction, axes=axes)
        registry.derived = {
            name: derived
            for name, derived in self.derived.items()
            if all(column in registry.statistics for column, _ in derived.powers)
        }
        return registry

    @property
    def identity(self) -> str:
        """Return a text that is equal for registries that lay out the same plane."""
        return hashlib.blake2b(json.dumps(self.to_dict()).encode(), digest_size=8).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values. Grids are written once."""
        grids = list(self.grids())
        return {
            "version": VERSION,
            "slots": self.slots,
            "grids": [{axis.name: list(axis.values) for axis in grid} for grid in grids],
            "statistics": [
                {
                    "name": statistic.name,
                    "unit": statistic.unit,
                    "reduction": statistic.reduction,
                    "first": statistic.first,
                    "count": statistic.count,
                    "grid": grids.index(statistic.grid),
                    "vital": statistic.vital,
                }
                for statistic in self.statistics.values()
            ],
            "derived": [{"name": d.name, "unit": d.unit, "powers": dict(d.powers)} for d in self.derived.values()],
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Registry":
        """Return the inverse of `to_dict`. Raises `ValueError` if the form is of another version or incomplete.

        Values may come from the network and become SQL (`store.connect`), so each is checked for its type.
        """
        try:
            if values["version"] != VERSION:
                raise ValueError(f"registry of version {values['version']}, this is {VERSION}")
            registry = Registry()
            for row in values["statistics"]:
                axes = values["grids"][row["grid"]]
                _check_names([row["name"], *axes])
                _check(row["reduction"] in get_args(Reduction), f"{row['reduction']!r} is no reduction")
                for axis, cells in axes.items():
                    _check(type(cells) is list and {*map(type, cells)} in ({int}, {str}), f"values of the axis {axis}")
                _check(type(row["unit"]) is str, f"unit of {row['name']}")
                registry.add(
                    row["name"], unit=row["unit"], reduction=row["reduction"], axes=axes, vital=bool(row["vital"])
                )
            for row in values["derived"]:
                _check_names([row["name"]])
                _check(type(row["unit"]) is str, f"unit of {row['name']}")
                for number in row["powers"].values():
                    _check(type(number) in (int, float) and math.isfinite(number), f"powers of {row['name']}")
                registry.derive(row["name"], unit=row["unit"], powers=row["powers"])
            slots = values["slots"]
        except (KeyError, IndexError, TypeError, AttributeError, OverflowError, AssertionError) as error:
            raise ValueError(f"not a registry: {error}") from error
        if registry.slots != slots:
            raise ValueError(f"a registry of {registry.slots} slots says that it has {slots!r}")
        return registry


def _check_names(names: Sequence[Any]) -> None:
    for name in names:
        _check(isinstance(name, str) and _NAME.fullmatch(name) is not None, f"{str(name)[:80]!r} is no name")


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"not a registry: {what}")
