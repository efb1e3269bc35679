"""Kept spans of the plane as documents of the page: heat maps by slice of time, extremes by layer, series by name.

    watch.View ─┬► cells   a statistic of a table with two axes: ratio of each cell to the centre of its row, by slice
                ├► edges   of the same table: max/median and min/median by row, by span
                └► named   a table with one axis: values by name, by span

Arrays travel as base64 of little-endian numbers. Axes: S slices or spans, C columns, L rows (layers), E cells of a row.
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from steptron.monitor.dashboard.plane_reader import View
from steptron.monitor.statistics.downsample import Spans, median

OCTAVES = 12
"""Ratios from 2**-12 to 2**12 are told apart."""


def describe(view: View) -> dict[str, Any]:
    """Return the description of a table: axes with their lengths, statistics with their units."""
    return {"axes": [[name, len(values)] for name, values in view.axes], "columns": view.columns}


def cells(view: View, column: str, stages: Sequence[str]) -> dict[str, Any]:
    """One statistic's heat map: `rows`, `cells`, `slices` ([first step, last step, stage]), `centre` float32 [S, L],
    `ratio` (`encode`)."""
    position = [name for name, _ in view.columns].index(column)
    mean, _ = view.spans()
    values_SLE = _means(mean)[:, position]
    by_mean = (
        column == "tokens"
    )  # the share that balance aims at; the median elsewhere, which one bad expert does not move
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
    """Extremes by row: `high` (max/median) and `low` (min/median), float32 [C, S, L]."""
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
    """Values by name: float32 [C, S, N]."""
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
    """Values relative to the centre of their row as base64 of little-endian uint16 [S, L, E].

    0: exactly zero (no token) · 65,535: not known · 1 to 65,534: the octaves −12 to 12 in even steps (0.03 % each).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        octaves_SLE = np.clip(np.log2(values_SLE / centre_SL[..., None]), -OCTAVES, OCTAVES)
        codes_SLE = 1 + np.rint((octaves_SLE + OCTAVES) / (2 * OCTAVES) * 65_533)
    codes_SLE = np.where(np.isfinite(octaves_SLE), codes_SLE, 65_535)
    codes_SLE[values_SLE == 0] = 0
    return base64.b64encode(codes_SLE.astype("<u2").tobytes()).decode()


def floats(values: np.ndarray) -> str:
    """Base64 of little-endian float32, rows last to first as they stand."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def _means(spans: Spans) -> np.ndarray:
    """[S, C, cells…]; NaN where nothing is known."""
    parts = [span.values for _, span in spans.in_order()]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack([part["sum"][1] / part["count"][1] for part in parts])


def _centre(values_SLE: np.ndarray, by_mean: bool) -> np.ndarray:
    """Mean or median of what is known of each row, [S, L]; NaN where nothing is."""
    known = np.isfinite(values_SLE)
    if by_mean:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(known, values_SLE, 0).sum(axis=-1) / known.sum(axis=-1)
    return median(values_SLE)


def _spans(spans: Spans, stages: Sequence[str]) -> list[list[Any]]:
    """[first step, last step, stage] of each."""
    return [
        [span.first, span.last, stages[min(max(stage, 1), len(stages)) - 1] if stages else ""]
        for stage, span in spans.in_order()
    ]
