"""The metrics plane on disk: Parquet files that a rank, or a server for many ranks, writes every few steps.

    FOLDER/layer_expert/rank-00000-steps-00000001-00000050.1.parquet     a file per part and flush, later merged
    FOLDER/layer/…  FOLDER/parameter/…  FOLDER/run/…                     a folder per table
    FOLDER/registry/rank-00000-00000001.json                             the meaning of the slots from that step on

The columns are the step, the grid's axes, and one column per statistic (float32: sums, maxima and minima as in the
plane; null where there is no value). Readers combine the rows of one step and cell, which come from several parts or
from frames that came late (`database`). FOLDER is a local folder or any URL that fsspec supports. A flush writes all
tables under temporary names and then renames them; each file names the tables that belong to it, so that `recover`
detects a flush that was interrupted. A thread merges files of many flushes into one (`compact`).

    Store ─► files ─► connect                  SQL, one view per table: SELECT step, activation_rms FROM layer_expert
                   ─► database.vital_planes    the vital statistics of each step, by which detectors decided
"""

import json
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from steptron.monitor.statistics.registry import Axis, Grid, Registry, Statistic, table_name
from steptron.monitor.storage.compact import Compactor, settle, truncate
from steptron.monitor.storage.coverage import Coverage
from steptron.monitor.storage.files import ABOUT, TORN, File, FileContent, Folder, file_name, read_about

if TYPE_CHECKING:
    from steptron.monitor.storage.database import Database

_TRIES = 5
"""The number of times that `covered` lists files if they are merged and removed before they are read."""


@dataclass(kw_only=True)
class _Layout:
    """The layout of a grid's rows; its key columns are made once."""

    table: str
    statistics: list[Statistic]
    keys: dict[str, pa.Array]
    cells: int


@dataclass(kw_only=True)
class _Kept:
    """A step in memory."""

    step: int
    plane: np.ndarray
    ranks: Collection[int]
    absent: np.ndarray | None


class Store:
    """Writes one part of a plane: it keeps steps in memory, and writes them to files every `flush_every` steps."""

    def __init__(
        self, folder: str | Path, part: str, registry: Registry, flush_every: int, attempt: int = 0, uid: str = ""
    ):
        """Open a part for writing.

        Args:
            folder: the folder of the plane, a path or a URL.
            part: such as `rank-00003` or `server-00`; no other process may write files of this part.
            registry: the meaning of the planes' slots.
            flush_every: number of steps in a file; `flush` may be called at any time in between.
            attempt: the run's attempt, by which a restarted server knows whether its files belong to the current one.
            uid: the run's uid; nothing is written if another uid is recorded. Empty: any run.
        """
        self.folder = Folder.at(folder)
        self.part = part
        self.registry = Registry()
        self.attempt = attempt
        self._uid, self._owned = uid, not uid
        self._flush_every = flush_every
        self._kept: list[_Kept] = []
        self._layouts: list[_Layout] = []
        self._schemas: dict[str, pa.Schema] = {}
        self._registered: int | None = None
        """The step from which on a file describes the slots."""
        self._late = False
        self._left: list[str] = []
        """The files of a flush that failed, to be removed."""
        self.lay_out(registry)
        files = settle(self.folder, self.folder.listed(part))
        self.folder.clean(part)
        self.empty = not files
        """True if the part had no files when it was opened."""
        self._flushes = max((file.end for file in files), default=0)
        """The number of the last flush."""
        self._compactor = Compactor(self.folder, part, files)

    def lay_out(self, registry: Registry, late: bool = False) -> None:
        """Set the meaning of the planes that come next. `late`: they are planes of one rank, of past steps."""
        self._late = late
        if registry is self.registry:
            return
        self.flush()
        self._layouts = [_layout(grid, statistics) for grid, statistics in registry.grids().items()]
        self._schemas = {
            table: _schema([layout for layout in self._layouts if layout.table == table])
            for table in dict.fromkeys(layout.table for layout in self._layouts)
        }
        self._registered = None
        self.registry = registry

    def add(
        self, step: int, plane: np.ndarray, ranks: Collection[int] = (0,), absent: np.ndarray | None = None
    ) -> None:
        """Keep a step; flush if there are enough.

        Args:
            step: the number of the step.
            plane: float32 [slots]; it must not be changed before the flush.
            ranks: the ranks whose values are in it.
            absent: bool [slots], True where there is no value; stored as null, or as no row if a cell has no values.
        """
        self._kept.append(_Kept(step=step, plane=plane, ranks=ranks, absent=absent))
        if len(self._kept) >= self._flush_every:
            self.flush()

    def flush(self) -> None:
        """Write the steps in memory, one file per table.

        Raises OSError if that fails; the steps are then lost.
        """
        kept, self._kept = self._kept, []
        if not kept:
            return
        try:
            self._sweep()
            self._write(kept)
        except Exception as error:  # remote file systems may raise anything
            with suppress(Exception):  # if it fails now, it is tried again before the next flush
                self._sweep()
            if isinstance(error, OSError):
                raise
            raise OSError(f"{type(error).__name__}: {error}") from error

    def _write(self, kept: list[_Kept]) -> None:
        if not self._owned and self.folder.own(self._uid) != self._uid:
            raise OSError(f"{self.folder.path} is another run's of the same name")
        self._owned = True
        first, last = min(row.step for row in kept), max(row.step for row in kept)
        self._write_registry(first)
        coverage = Coverage()
        for row in kept:
            coverage.add(row.step, row.ranks)
        about = {"steps": coverage.to_json(), "tables": list(self._schemas), "attempt": self.attempt}
        self._flushes += 1
        name = file_name(self.part, first, last, self._flushes, self._flushes)
        files: list[File] = []
        by_path: dict[str, FileContent] = {}
        for table, schema in self._schemas.items():
            schema = schema.with_metadata({ABOUT: json.dumps(about)})
            path = f"{self.folder.path}/{table}/{name}"
            tables = [
                pa.Table.from_batches([_batch(layout, row, schema) for row in kept], schema)
                for layout in self._layouts
                if layout.table == table
            ]
            by_path[path] = FileContent(schema=schema, tables=tables)
            files.append(File(path, table, self.part, first, last, self._flushes, self._flushes))
        self._left = list(by_path)
        self.folder.write_tables(by_path)
        self._left = []
        self._compactor.add(files)

    def _sweep(self) -> None:
        """Remove the files of a flush that failed: its steps may come again."""
        self.folder.fs.invalidate_cache()
        for path in self._left:
            if self.folder.fs.exists(path):
                self.folder.remove(path)
        self._left = []

    def truncate_after(self, step: int, also: Callable[[str], bool] = lambda part: False) -> None:
        """Drop the steps after `step`, on disk and in memory, also from the parts that `also` accepts."""
        self._kept = [row for row in self._kept if row.step <= step]
        self.flush()
        with self._compactor.held():
            truncate(self.folder, step, lambda part: part == self.part or also(part))
        self._registered = None

    def close(self) -> None:
        """Write the remaining steps, and end the merging of files."""
        self.flush()
        self._compactor.close()

    def abandon(self) -> None:
        """Stop using the folder, because another run owns it from now on."""
        self._compactor.abandon()

    def _write_registry(self, step: int) -> None:
        """Write the meaning of the slots from `step` on, unless a file has it already."""
        if self._registered is not None and self._registered <= step:
            return
        files = self.folder.registry_files(self.part)
        before = [(file, known) for file, known in self.folder.read_registries(self.part) if file.first <= step]
        identities = [known.identity for _, known in before]
        # Late frames of several ranks alternate, and each registry need be written only once. A vital registry is in
        # force until the next one.
        in_force = identities if self._late and not self.registry.vital_slots else identities[-1:]
        if self.registry.identity not in in_force:
            name = before[-1][0].path.rpartition("/")[2] if before else None
            again = max((file.again + 1 for file in files if file.first == step), default=0)
            text = json.dumps(self.registry.to_dict() | {"follows": name}, indent=1)
            self.folder.write_bytes(self.folder.registry_path(self.part, step, again), text.encode())
        self._registered = step


def covered(folder: Folder, chosen: Callable[[str], bool]) -> Coverage:
    """Return the coverage on disk of the parts that `chosen` accepts. Incomplete files are skipped."""
    for _ in range(_TRIES):
        coverage = Coverage()
        by_flush = {(file.part, file.first, file.start, file.end): file for file in folder.files() if chosen(file.part)}
        with suppress(FileNotFoundError):  # merged and removed since
            for file in by_flush.values():
                with suppress(*TORN):
                    coverage.update(Coverage(read_about(folder, file)["steps"]))
            return coverage
    raise OSError(f"{folder.path}: its files change faster than they can be read")


def connect(folder: str | Path, locked: bool = False) -> "Database":
    """Open the plane in `folder`, a path or a URL, for SQL; see `database.Database`."""
    from steptron.monitor.storage.database import Database  # a large import, which no writer needs

    return Database(folder, locked)


def registries(folder: str | Path) -> list[Registry]:
    """Return all registries of the plane, by rising first step."""
    return [registry for _, _, registry in Folder.at(folder).registries()]


def _layout(grid: Grid, statistics: list[Statistic]) -> _Layout:
    """Return the key columns of a grid, in the order of its slots."""
    cells, inner = statistics[0].count, statistics[0].count
    keys = {}
    for axis in grid:
        inner //= len(axis.values)
        keys[axis.name] = _key_column(axis, inner, cells)
    return _Layout(table=table_name(grid), statistics=statistics, keys=keys, cells=cells)


def _key_column(axis: Axis, inner: int, cells: int) -> pa.Array:
    """Return an axis' values along the grid: each one `inner` times, and all repeated."""
    positions = np.resize(np.repeat(np.arange(len(axis.values), dtype=np.int32), inner), cells)
    if isinstance(axis.values[0], str):
        return pa.DictionaryArray.from_arrays(_column(positions, pa.int32()), _strings([str(v) for v in axis.values]))
    return _column(np.array(axis.values, dtype=np.int32)[positions], pa.int32())


def _column(values: np.ndarray, kind: pa.DataType, valid: np.ndarray | None = None) -> pa.Array:
    """Return a column that uses the memory of `values`.

    `pa.array` would import pandas to check its type, which takes most of a second.
    """
    bits = None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little"))
    return pa.Array.from_buffers(kind, len(values), [bits, pa.py_buffer(values)])


def _strings(texts: list[str]) -> pa.StringArray:
    """Return a column of texts, also without `pa.array`."""
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(texts), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


def _schema(layouts: list[_Layout]) -> pa.Schema:
    """Return the columns of a table: step, axes, and every statistic with its unit and reduction."""
    fields = {"step": pa.field("step", pa.int64())}
    fields |= {name: pa.field(name, column.type) for layout in layouts for name, column in layout.keys.items()}
    for statistic in (statistic for layout in layouts for statistic in layout.statistics):
        metadata = {"unit": statistic.unit, "reduction": statistic.reduction}
        fields[statistic.name] = pa.field(statistic.name, pa.float32(), metadata=metadata)
    return pa.schema(list(fields.values()))


def _batch(layout: _Layout, row: _Kept, schema: pa.Schema) -> pa.RecordBatch:
    """Return one step of one grid. Columns of the table's other grids are null."""
    columns: dict[str, pa.Array] = dict(layout.keys)
    slots = [slice(statistic.first, statistic.first + layout.cells) for statistic in layout.statistics]
    names = [statistic.name for statistic in layout.statistics]
    rows = layout.cells
    if row.absent is None or not (absent := np.stack([row.absent[s] for s in slots])).any():
        columns |= {name: _column(row.plane[s], pa.float32()) for name, s in zip(names, slots, strict=True)}
    else:
        kept = np.flatnonzero(~absent.all(axis=0))
        rows = len(kept)
        columns = {name: column.take(_column(kept, pa.int64())) for name, column in columns.items()}
        for name, s, missing in zip(names, slots, absent, strict=True):
            columns[name] = _column(row.plane[s][kept], pa.float32(), ~missing[kept])
    columns["step"] = _column(np.full(rows, row.step, np.int64), pa.int64())
    arrays = [columns[f.name] if f.name in columns else pa.nulls(rows, f.type) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
