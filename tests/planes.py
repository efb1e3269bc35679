"""Planes of several ranks put together as readers of the store do, but naively: cell by cell, in Python."""

import math

import torch

from steptron.monitor.statistics.registry import Registry


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
                cell: _product(derived.scale, [(found[column][cell], power) for column, power in derived.powers])
                for cell in found[derived.powers[0][0]]
            }
    return found


def _put_together(column: dict[tuple, float], cell: tuple, value: float, reduction: str) -> None:
    if cell not in column or math.isnan(column[cell]):
        column[cell] = value
    elif reduction == "sum":
        column[cell] += value
    elif not math.isnan(value):
        column[cell] = max(column[cell], value) if reduction == "max" else min(column[cell], value)


def _cells(grid: tuple) -> list[tuple]:
    cells: list[tuple] = [()]
    for axis in grid:
        cells = [(*cell, value) for cell in cells for value in axis.values]
    return cells


def _product(scale: float, factors: list[tuple[float, float]]) -> float:
    try:
        product = scale
        for value, power in factors:
            product *= value**power
        return product if isinstance(product, float) else math.nan
    except ZeroDivisionError:
        return math.nan
