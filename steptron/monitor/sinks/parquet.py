"""The metrics plane on disk: metrics/steps-FIRST-LAST.parquet, one file every few steps.

    step, <axes of the grids: layer, expert, …>, <statistics: tokens, …>        a row a cell and step

Cells of all grids share one table: axes and statistics that a grid does not have are null in its rows, and each grid
has row groups of its own, so that the nulls take no room and readers skip what they do not ask for. With DuckDB:

    SELECT step, layer, max(tokens) / avg(tokens) AS imbalance FROM 'metrics/*.parquet' GROUP BY ALL ORDER BY ALL
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from steptron.monitor.frame import Frame
from steptron.monitor.registry import FOLDER_NAME, Grid, Registry, Statistic

_GROUP_ROWS = 1 << 17
"""Rows of a row group, about: what one reader thread takes at a time."""


class ParquetSink:
    """Keeps frames in memory and writes a file every `flush_every` steps, and whenever it is flushed."""

    def __init__(self, run_dir: Path, registry: Registry, flush_every: int):
        self._folder = run_dir / FOLDER_NAME
        self._registry = registry
        self._flush_every = flush_every
        self._schema = _schema(registry)
        self._steps: list[int] = []
        self._planes: list[np.ndarray] = []
        registry.write(run_dir)
        for leftover in self._folder.glob("*.parquet.tmp"):
            leftover.unlink()

    def write(self, frame: Frame) -> None:
        """Keep the step; the plane must not be changed afterwards."""
        assert frame.plane is not None, "a frame for the Parquet sink has a plane"
        self._steps.append(frame.step)
        self._planes.append(frame.plane)
        if len(self._steps) >= self._flush_every:
            self.flush()

    def flush(self) -> None:
        """Write what is kept as one file, whole or not at all."""
        if not self._steps:
            return
        steps, planes_SP = np.array(self._steps), np.stack(self._planes)  # S steps, P slots
        self._steps, self._planes = [], []
        tables = [self._table(steps, planes_SP, grid, columns) for grid, columns in self._registry.grids().items()]
        self._write_file(int(steps[0]), int(steps[-1]), tables)

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps."""
        self.flush()
        for path in sorted(self._folder.glob("steps-*.parquet")):
            first, last = (int(number) for number in path.stem.split("-")[1:])
            if first > step:
                path.unlink()
            elif last > step:
                table = pq.read_table(path, filters=[("step", "<=", step)])
                self._write_file(first, step, [table])
                path.unlink()

    def close(self) -> None:
        """Write what is left."""
        self.flush()

    def _table(self, steps: np.ndarray, planes_SP: np.ndarray, grid: Grid, statistics: list[Statistic]) -> pa.Table:
        """Rows of one grid: steps slowest, then the axes in their order."""
        cells = statistics[0].count
        rows = cells * len(steps)
        columns: dict[str, np.ndarray] = {"step": np.repeat(steps, cells)}
        for position, axis in enumerate(grid):
            inner = int(np.prod(statistics[0].shape[position + 1 :]))
            columns[axis.name] = np.resize(np.repeat(np.array(axis.values), inner), rows)
        for statistic in statistics:
            columns[statistic.name] = planes_SP[:, statistic.first : statistic.first + cells].ravel()
        arrays = [
            _array(columns[field.name], field.type) if field.name in columns else pa.nulls(rows, field.type)
            for field in self._schema
        ]
        return pa.Table.from_arrays(arrays, schema=self._schema)

    def _write_file(self, first: int, last: int, tables: list[pa.Table]) -> None:
        """One file; a reader never sees half of it."""
        path = self._folder / f"steps-{first:08d}-{last:08d}.parquet"
        temporary = path.with_suffix(".parquet.tmp")
        schema = tables[0].schema
        # Counts in float32 differ in few bytes: split by byte they compress best; keys repeat: dictionaries.
        floats = [field.name for field in schema if field.type == pa.float32()]
        others = [field.name for field in schema if field.type != pa.float32()]
        encodings: dict[str, Any] = {"use_dictionary": others, "use_byte_stream_split": floats}
        with pq.ParquetWriter(temporary, schema, compression="zstd", **encodings) as writer:
            for table in tables:
                writer.write_table(table, row_group_size=_GROUP_ROWS)
        temporary.replace(path)


def _array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """A column. `pa.array` would import pandas to look at it, which holds up the first file by most of a second."""
    if kind == pa.string():
        return pa.array(values.tolist(), kind)
    plain = np.ascontiguousarray(values, dtype=kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(plain), [None, pa.py_buffer(plain)])


def _schema(registry: Registry) -> pa.Schema:
    """Columns of the table: step, every axis, every statistic with its unit and reduction."""
    axes: dict[str, pa.DataType] = {}
    for grid in registry.grids():
        for axis in grid:
            axes[axis.name] = pa.string() if isinstance(axis.values[0], str) else pa.int32()
    fields = [pa.field("step", pa.int64())]
    fields += [pa.field(name, kind) for name, kind in axes.items()]
    fields += [
        pa.field(statistic.name, pa.float32(), metadata={"unit": statistic.unit, "reduction": statistic.reduction})
        for statistic in registry.statistics.values()
    ]
    return pa.schema(fields)
