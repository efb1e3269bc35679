"""Which slot of the metrics plane means what.

The plane is one flat float32 array a step. Each statistic owns a range of its slots: the cells of a grid, in row-major
order. A grid is a tuple of named axes, such as (layer, expert). Statistics on one grid share the rows of the Parquet
table, a column each.

    registry.json   {"version", "slots", "statistics": [
                        {"name", "unit", "reduction", "first", "count", "axes": {"layer": [3, …], "expert": [0, …]}}]}

So slot s of a statistic on (layer, expert) is cell divmod(s − first, number of experts).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

FOLDER_NAME = "metrics"
FILE_NAME = "registry.json"

Reduction = Literal["sum", "mean", "min", "max"]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a grid."""

    name: str
    """`layer`, `expert`, …: a column of the Parquet table."""
    values: tuple[int | str, ...]
    """What its positions stand for: global layer indices, expert numbers, parameter names."""


Grid = tuple[Axis, ...]


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """A named range of slots."""

    name: str
    """Column of the Parquet table; unique."""
    unit: str
    """Of the values, as people write it."""
    reduction: Reduction
    """How values of micro-batches and ranks become one."""
    grid: Grid
    """The axes, slowest first."""
    first: int
    """Its first slot."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells by axis."""
        return tuple(len(axis.values) for axis in self.grid)

    @property
    def count(self) -> int:
        """Slots it owns."""
        return int(np.prod(self.shape))


class Registry:
    """The layout of the plane: filled at start-up, then only read."""

    def __init__(self) -> None:
        self.statistics: dict[str, Statistic] = {}

    @property
    def slots(self) -> int:
        """Length of the plane."""
        return sum(statistic.count for statistic in self.statistics.values())

    def add(self, name: str, *, unit: str, reduction: Reduction, axes: Mapping[str, Sequence[int | str]]) -> Statistic:
        """Give a statistic the next free slots. `axes`: what the positions stand for, by axis name, slowest first."""
        assert name not in self.statistics, f"statistic {name!r} is registered twice"
        grid = tuple(Axis(name=axis, values=tuple(values)) for axis, values in axes.items())
        statistic = Statistic(name=name, unit=unit, reduction=reduction, grid=grid, first=self.slots)
        self.statistics[name] = statistic
        return statistic

    def grids(self) -> dict[Grid, list[Statistic]]:
        """Statistics by grid, both in the order of registration."""
        grids: dict[Grid, list[Statistic]] = {}
        for statistic in self.statistics.values():
            grids.setdefault(statistic.grid, []).append(statistic)
        return grids

    def new_plane(self) -> np.ndarray:
        """A plane with no value in it yet: NaN, float32 [slots]."""
        return np.full(self.slots, np.nan, dtype=np.float32)

    def view(self, plane: np.ndarray, name: str) -> np.ndarray:
        """One statistic's part of a plane, shaped as its grid; shares the plane's memory."""
        statistic = self.statistics[name]
        return plane[statistic.first : statistic.first + statistic.count].reshape(statistic.shape)

    def write(self, run_dir: Path) -> None:
        """Put registry.json beside the Parquet files, whole or not at all."""
        rows = [
            {
                "name": statistic.name,
                "unit": statistic.unit,
                "reduction": statistic.reduction,
                "first": statistic.first,
                "count": statistic.count,
                "axes": {axis.name: axis.values for axis in statistic.grid},
            }
            for statistic in self.statistics.values()
        ]
        path = run_dir / FOLDER_NAME / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"version": 1, "slots": self.slots, "statistics": rows}) + "\n")
        temporary.replace(path)

    @staticmethod
    def read(run_dir: Path) -> "Registry | None":
        """The registry of a run folder. None: there is none, or it is not whole."""
        try:
            rows = json.loads((run_dir / FOLDER_NAME / FILE_NAME).read_text())["statistics"]
        except (OSError, ValueError, KeyError):
            return None
        registry = Registry()
        for row in rows:
            registry.add(row["name"], unit=row["unit"], reduction=row["reduction"], axes=row["axes"])
        return registry
