"""A summary of a step's plane: a few hundred numbers, for sinks that cannot take six million (W&B).

    run, source, position, mtp_head     every value
    layer                               every value of the best known statistics, else lowest, median, highest
    layer_expert                        by layer, max/median and min/median of `WARNING` statistics; else as below
    layer_head, parameter, rank, …      lowest, median, highest, and the worst few by name

Names are SECTION/STATISTIC/…; sections are W&B's: train, data, experts, layers, heads, parameters, modules, ranks.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from steptron.monitor.statistics.registry import Registry, table_name

SECTIONS = {
    "layer_expert": "experts",
    "layer": "layers",
    "layer_head": "heads",
    "parameter": "parameters",
    "module": "modules",
    "rank": "ranks",
    "source": "data",
    "position": "train",
    "mtp_head": "train",
}
"""The section of each table."""
WARNING = ("out_norm", "activation_rms", "weight_norm")
"""The statistics of experts whose extremes by layer are reported, because the loss does not show them."""
BY_LAYER = ("router_entropy", "routing_confidence", "residual_rms", "residual_max")
"""The statistics of layers that are reported for each layer."""
WORST_IS_LOW = frozenset({"tokens", "activation_rms", "weight_norm", "attention_entropy", "gate_mean", "alignment"})
"""The statistics whose lowest values are the worst; for all others the highest are."""
ALL_BELOW = 16
"""The number of names below which a table is reported completely."""


def of_plane(registry: Registry, plane: np.ndarray, worst: int) -> dict[str, float]:
    """Return the summary of one step's plane.

    Args:
        registry: the meaning of the plane.
        plane: values, float32 [slots].
        worst: number of values reported by name, where there are too many to report all.
    """
    told: dict[str, float] = {}
    for table, name in shown(registry):
        values = registry.values(plane, name)
        if table not in SECTIONS or not np.isfinite(values).any():
            continue
        labels = [_labels(axis.name, axis.values) for axis in registry.grid_of(name)]
        path = f"{SECTIONS[table]}/{name}"
        if table == "layer_expert" and (name in WARNING or name == "tokens"):
            told |= _experts(path, values, labels[0])
        if len(labels) == 1 and (name in BY_LAYER or len(labels[0]) < ALL_BELOW):
            told |= _every(path, values, labels[0])
        else:
            told |= _extremes(path, values) | _worst(path, values, labels, worst, name in WORST_IS_LOW)
    return told


def shown(registry: Registry) -> Iterator[tuple[str, str]]:
    """Yield table and name of each statistic for people: derived ones, and those from which none is derived."""
    parts = {column for derived in registry.derived.values() for column, _ in derived.powers}
    for name in (*registry.derived, *registry.statistics):
        if name not in parts:
            yield table_name(registry.grid_of(name)), name


def worst_cells(values: np.ndarray, count: int, low: bool) -> list[tuple[int, ...]]:
    """Return the positions of the worst known values, worst first."""
    flat = values.ravel()
    known = np.flatnonzero(np.isfinite(flat))
    order = known[np.argsort(flat[known] if low else -flat[known], kind="stable")[:count]]
    return [tuple(int(i) for i in np.unravel_index(at, values.shape)) for at in order.tolist()]


def _experts(path: str, values_LE: np.ndarray, layers: Sequence[str]) -> dict[str, float]:
    """Return the extremes of each layer's experts divided by the layer's middle.

    The middle is the mean for tokens, which balance aims at, else the median.
    """
    told: dict[str, float] = {}
    tokens = path.endswith("/tokens")
    known_LE = np.where(np.isfinite(values_LE), values_LE, np.nan)
    what = "mean" if tokens else "median"
    high, low, idle = [], [], 0
    for label, row_E in zip(layers, known_LE, strict=True):
        row_E = row_E[np.isfinite(row_E)]
        middle = float(row_E.mean() if tokens else np.median(row_E)) if len(row_E) else 0.0
        if tokens:
            told[f"{path}/idle/{label}"] = float(np.count_nonzero(row_E == 0))
            idle += np.count_nonzero(row_E == 0)
        if middle > 0:
            high.append(float(row_E.max()) / middle)
            low.append(float(row_E.min()) / middle)
            told[f"{path}/max_over_{what}/{label}"] = high[-1]
            told[f"{path}/min_over_{what}/{label}"] = low[-1]
    if high:
        told[f"{path}/max_over_{what}"], told[f"{path}/min_over_{what}"] = max(high), min(low)
    if tokens:
        told[f"{path}/idle"] = float(idle)
    return told


def _every(path: str, values: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    return {f"{path}/{label}": float(v) for label, v in zip(labels, values, strict=True) if np.isfinite(v)}


def _extremes(path: str, values: np.ndarray) -> dict[str, float]:
    known = values[np.isfinite(values)]
    numbers = {"min": known.min(), "median": np.median(known), "max": known.max()}
    return {f"{path}/{name}": float(value) for name, value in numbers.items()}


def _worst(path: str, values: np.ndarray, labels: Sequence[Sequence[str]], count: int, low: bool) -> dict[str, float]:
    cells = worst_cells(values, count, low)
    names = (".".join(axis[i] for axis, i in zip(labels, cell, strict=True)) for cell in cells)
    return {f"{path}/worst/{name}": float(values[cell]) for name, cell in zip(names, cells, strict=True)}


def _labels(axis: str, values: Sequence[int | str]) -> list[str]:
    """Return names such as `layer_07`, `expert_012`, `rank_00003`.

    All have as many digits as the largest needs, at least two.
    """
    if all(isinstance(value, str) for value in values):
        return [str(value) for value in values]
    digits = max(2, *(len(str(value)) for value in values))
    return [f"{axis}_{value:0{digits}d}" for value in values]
