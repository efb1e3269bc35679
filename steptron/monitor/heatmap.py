"""Expert loads over a run, in slices of time: metrics/*.parquet ─► tokens [slices, layers, experts] ─► base64.

A long run is sampled: whole files at even distances, so that the report of a hundred thousand steps reads no more than
that of a few thousand. Axes: S slices, L layers, E experts.
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from steptron.monitor import series
from steptron.monitor.registry import FOLDER_NAME, Registry

MAX_VALUES_READ = 60_000_000
"""Values that are read at most: a few seconds."""
MAX_VALUES_KEPT = 800_000
"""Values in the page at most: two bytes each."""
MAX_SLICES = 120
"""Positions of the slider."""
OCTAVES = 12
"""Loads from 2**-12 to 2**12 times the mean are told apart."""


def read(run_dir: Path, steps: Sequence[int], stages: Sequence[str]) -> dict[str, Any] | None:
    """The heat map of a run, ready for the page.

    Args:
        run_dir: the run folder.
        steps: steps in metrics.jsonl, rising.
        stages: stage of each of them.

    Returns:
        `layers`, `experts`, `slices` ([first step, last step, stage]), `load` (see `encode`). None: nothing is there.
    """
    registry = Registry.read(run_dir)
    if registry is None or "tokens" not in registry.statistics or not steps:
        return None
    layers, experts = ([int(value) for value in axis.values] for axis in registry.statistics["tokens"].grid)
    files = _sample(sorted((run_dir / FOLDER_NAME).glob("steps-*.parquet")), len(layers) * len(experts))
    limit = max(1, min(MAX_SLICES, MAX_VALUES_KEPT // (len(layers) * len(experts))))
    borders = series.edges(stages, limit)
    slice_of = _positions(steps, np.repeat(np.arange(len(borders) - 1), np.diff(borders)))
    row_of = _positions(layers, np.arange(len(layers)))
    tokens_SLE = np.zeros((len(borders) - 1, len(layers), len(experts)))
    for file in files:
        _add(tokens_SLE, file, slice_of, row_of)
    seen = np.flatnonzero(tokens_SLE.sum(axis=(1, 2)))
    if len(seen) == 0:
        return None
    slices = [[steps[borders[s]], steps[borders[s + 1] - 1], stages[borders[s]]] for s in seen]
    return {"layers": layers, "experts": len(experts), "slices": slices, "load": encode(tokens_SLE[seen])}


def _positions(keys: Sequence[int], positions: np.ndarray) -> np.ndarray:
    """A table from key to position, −1 where there is no such key; the last entry is always −1."""
    table = np.full(max(keys) + 2, -1)
    table[np.asarray(keys)] = positions
    return table


def encode(tokens_SLE: np.ndarray) -> str:
    """Loads relative to the layer's mean as base64 of little-endian uint16 [S, L, E].

    0 is an expert without a token; 1 to 65,535 are the octaves −12 to 12 in even steps (0.03 % each).
    """
    mean_SL1 = tokens_SLE.mean(axis=2, keepdims=True)
    ratio_SLE = tokens_SLE / np.maximum(mean_SL1, 1e-30)
    with np.errstate(divide="ignore"):
        octaves_SLE = np.clip(np.log2(ratio_SLE), -OCTAVES, OCTAVES)
    codes_SLE = 1 + np.rint((octaves_SLE + OCTAVES) / (2 * OCTAVES) * 65_534)
    codes_SLE[tokens_SLE == 0] = 0
    return base64.b64encode(codes_SLE.astype("<u2").tobytes()).decode()


def _sample(files: list[Path], cells: int) -> list[Path]:
    """All files, or every n-th where reading all would take too long."""
    covered = sum(int(last) - int(first) + 1 for first, last in (file.stem.split("-")[1:] for file in files))
    stride = max(1, -(-covered * cells // MAX_VALUES_READ))
    return files[::stride]


def _add(tokens_SLE: np.ndarray, file: Path, slice_of: np.ndarray, row_of: np.ndarray) -> None:
    """Add a file's counts to the slices they belong to. A file that cannot be read is left out.

    `slice_of` and `row_of` are the positions by step and by global layer index; −1: not in the page.
    """
    try:
        table = pq.read_table(file, columns=["step", "layer", "expert", "tokens"])
    except (OSError, pa.ArrowInvalid):
        return
    table = table.filter(table["tokens"].is_valid())
    step, layer, expert, tokens = (table[name].to_numpy() for name in ("step", "layer", "expert", "tokens"))
    slice_ = slice_of[np.minimum(step, len(slice_of) - 1)]
    known = slice_ >= 0
    cell = (slice_ * tokens_SLE.shape[1] + row_of[layer]) * tokens_SLE.shape[2] + expert
    tokens_SLE += np.bincount(cell[known], tokens[known], tokens_SLE.size).reshape(tokens_SLE.shape)
