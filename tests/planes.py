"""Planes of several ranks combined as readers of the store do, but naively: cell by cell, in Python; the steps of a
store."""

import math
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from steptron.monitor.statistics.registry import Registry
from steptron.monitor.storage.files import Folder
from steptron.monitor.storage.store import covered


def steps_in(folder: str | Path, part: str = "*") -> dict[int, frozenset[int]]:
    """Return the steps on disk, rising, with the ranks whose values are there. `part` is a pattern."""
    return dict(covered(Folder.at(folder), lambda name: fnmatchcase(name, part)))


def merged(planes: list[tuple[dict, torch.Tensor]]) -> dict[str, dict[tuple, float]]:
    """By statistic, plain and derived: value by cell (a tuple of axis values)."""
    registries = [(Registry.from_dict(layout), values.tolist()) for layout, values in planes]
    found: dict[str, dict[tuple, float]] = {}
    for registry, values in registries:
        for name, statistic in registry.statistics.items():
            column = found.setdefault(name, {})
            for place, cell in enumerate(_cells(statistic.grid)):
                _put_together(column, cell, values[statistic.first + place], statistic.reduction)
    for registry, _ in registries:
        for name, derived in registry.derived.items():
            found[name] = {
                cell: _product([(found[column][cell], power) for column, power in derived.powers])
                for cell in found[derived.powers[0][0]]
            }
    return found


def _put_together(column: dict[tuple, float], cell: tuple, value: float, reduction: str) -> None:
    if cell not in column:
        column[cell] = value
    elif reduction == "sum":
        column[cell] += value
    elif math.isnan(column[cell]):
        column[cell] = value
    elif not math.isnan(value):
        column[cell] = max(column[cell], value)


def _cells(grid: tuple) -> list[tuple]:
    cells: list[tuple] = [()]
    for axis in grid:
        cells = [(*cell, value) for cell in cells for value in axis.values]
    return cells


def _product(factors: list[tuple[float, float]]) -> float:
    try:
        product = 1.0
        for value, power in factors:
            product *= value**power
        return product if isinstance(product, float) else math.nan
    except ZeroDivisionError:
        return math.nan
