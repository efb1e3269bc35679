"""Documents of heat maps and curves from the plane: heat maps by slice of time, extremes by layer, series by name.

    plane_reader.View ─┬► cells   a statistic of a table with two axes: ratio of cells to the centre of their row
                       ├► edges   of the same table: max/median and min/median by row, by span
                       └► named   a table with one axis: values by name, by span

Arrays are sent as base64 of little-endian numbers. Axes: S slices or spans, C columns, L rows (layers), E cells of a
row.
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from steptron.monitor.dashboard.plane_reader import View
from steptron.monitor.statistics.downsample import Spans, median

OCTAVES = 12
"""The range of ratios that are distinguished, from 2**-12 to 2**12."""


def describe(view: View) -> dict[str, Any]:
    """Return the description of a table: axes with their lengths, statistics with their units."""
    return {"axes": [[name, len(values)] for name, values in view.axes], "columns": view.columns}


def cells(view: View, column: str, stages: Sequence[str]) -> dict[str, Any]:
    """Return one statistic's heat map.

    It has `rows`, `cells`, `slices` ([first step, last step, stage]), `centre` float32 [S, L], and `ratio` (`encode`).
    """
    position = [name for name, _ in view.columns].index(column)
    mean, _ = view.spans()
    values_SLE = _means(mean)[:, position]
    by_mean = (
        column == "tokens"
    )  # the mean is what balance aims at; elsewhere the median, which one bad expert does not change
    centre_SL = _centre(values_SLE, by_mean)
    (row, rows), (cell, names) = view.axes
    return {
        "row": row,
        "rows": rows,
        "cell": cell,
        "cells": names,
        "unit": view.columns[position][1],
        "centre_is": "mean" if by_mean else "median",
        "slices": _spans(mean, stages),
        "centre": floats(centre_SL),
        "ratio": encode(values_SLE, centre_SL),
    }


def edges(view: View, stages: Sequence[str]) -> dict[str, Any]:
    """Return extremes by row: `high` (max/median) and `low` (min/median), float32 [C, S, L]."""
    _, extremes = view.spans()
    spans = [span for _, span in extremes.in_order()]
    high, low = (np.stack([span.values[name][1] for span in spans], axis=1) for name in ("high", "low"))
    row, rows = view.axes[0]
    return {
        "row": row,
        "rows": rows,
        "columns": view.columns,
        "spans": _spans(extremes, stages),
        "high": floats(high),
        "low": floats(low),
    }


def named(view: View, stages: Sequence[str]) -> dict[str, Any]:
    """Return values by name: float32 [C, S, N]."""
    axis, names = view.axes[0]
    mean, _ = view.spans()
    return {
        "axis": axis,
        "names": names,
        "columns": view.columns,
        "spans": _spans(mean, stages),
        "values": floats(np.moveaxis(_means(mean), 1, 0)),
    }


def encode(values_SLE: np.ndarray, centre_SL: np.ndarray) -> str:
    """Return values relative to the centre of their row, as base64 of little-endian uint16 [S, L, E].

    0: exactly zero (no token) · 65,535: not known · 1 to 65,534: the octaves −12 to 12 in even steps (0.03 % each).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        octaves_SLE = np.clip(np.log2(values_SLE / centre_SL[..., None]), -OCTAVES, OCTAVES)
        codes_SLE = 1 + np.rint((octaves_SLE + OCTAVES) / (2 * OCTAVES) * 65_533)
    codes_SLE = np.where(np.isfinite(octaves_SLE), codes_SLE, 65_535)
    codes_SLE[values_SLE == 0] = 0
    return base64.b64encode(codes_SLE.astype("<u2").tobytes()).decode()


def floats(values: np.ndarray) -> str:
    """Return base64 of little-endian float32 values, in row-major order."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def _means(spans: Spans) -> np.ndarray:
    """Return means [S, C, cells…]; NaN where nothing is known."""
    parts = [span.values for _, span in spans.in_order()]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack([part["sum"][1] / part["count"][1] for part in parts])


def _centre(values_SLE: np.ndarray, by_mean: bool) -> np.ndarray:
    """Return mean or median of the known values of each row, [S, L]; NaN if there are none."""
    known = np.isfinite(values_SLE)
    if by_mean:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(known, values_SLE, 0).sum(axis=-1) / known.sum(axis=-1)
    return median(values_SLE)


def _spans(spans: Spans, stages: Sequence[str]) -> list[list[Any]]:
    """Return [first step, last step, stage] of each span."""
    return [
        [span.first, span.last, stages[min(max(stage, 1), len(stages)) - 1] if stages else ""]
        for stage, span in spans.in_order()
    ]
