"""The metrics plane on disk: Parquet files that a rank, or a server for many ranks, writes every few steps.

    FOLDER/layer_expert/rank-00000-steps-00000001-00000050.parquet       a folder a table, a file a part and flush
    FOLDER/layer/…  FOLDER/parameter/…  FOLDER/run/…
    FOLDER/registry/rank-00000-00000001.json                             what the slots mean, from that step on

Rows: step, the grid's axes, then a column a statistic (float32: sums, maxima, minima as they are in the plane; null where no
value came). Rows of one step and cell, from several parts or from frames that came late, are put together when they are read
(`connect`). FOLDER is a local folder or any URL that fsspec knows. A flush writes all tables under temporary names and
then renames them; each file says which tables belong to it, so that `recover` can tell a flush that was cut short.

    Store ─► files ─► connect        SQL, a view a table: SELECT step, layer, expert, activation_rms FROM layer_expert
                   ─► vital_planes   step by step what detectors decided by
"""

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from steptron.monitor.coverage import Coverage
from steptron.monitor.files import ABOUT, TORN, File, Folder, file_name, read_about
from steptron.monitor.registry import Axis, Derived, Grid, Registry, Statistic, table_name

if TYPE_CHECKING:
    import duckdb

_VALUES_AT_ONCE = 4_000_000
"""That `vital_planes` reads in one go."""


@dataclass(kw_only=True)
class _Layout:
    """A grid as it is written: its key columns are made once."""

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
    """Writes one part of a plane: keeps steps in memory, and makes files of them every `flush_every` steps."""

    def __init__(
        self, folder: str | Path, part: str, registry: Registry, flush_every: int, attempt: int = 0, uid: str = ""
    ):
        """Open a part for writing.

        Args:
            folder: of the plane, a path or a URL.
            part: `rank-00003`, `server-00`; nobody else writes files of this part.
            registry: what the planes mean.
            flush_every: steps in a file; `flush` may be called at any time in between.
            attempt: of the run, by which a server that comes back knows whether its files are of this one.
            uid: of the run; nothing is written where another one is written down. Empty: whoever's it is.
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
        """From this step on a file says what the slots mean."""
        self._late = False
        self._left: list[str] = []
        """Files of a flush that failed."""
        self.lay_out(registry)
        self._names = {(file.first, file.again) for file in self.folder.files(part)}
        self.folder.clean(part)

    @property
    def empty(self) -> bool:
        """Whether the part has no files."""
        return not self._names

    def lay_out(self, registry: Registry, late: bool = False) -> None:
        """Say what the planes that come next mean. `late`: those of one rank, of steps that are over."""
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
        """Keep a step; flush when there are enough.

        Args:
            step: its number.
            plane: float32 [slots]; it must not be changed before the flush.
            ranks: those whose values are in it.
            absent: where no value has come, bool [slots]; stored as null, and as no row where a cell has none at all.
        """
        self._kept.append(_Kept(step=step, plane=plane, ranks=ranks, absent=absent))
        if len(self._kept) >= self._flush_every:
            self.flush()

    def flush(self) -> None:
        """Write what is kept, one file a table. Raises OSError where that fails; what was kept is lost then, all of it."""
        kept, self._kept = self._kept, []
        if not kept:
            return
        try:
            self._sweep()
            self._write(kept)
        except Exception as error:  # remote file systems raise what they like
            with suppress(Exception):  # if not now, before the next flush
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
        again = 0
        while (first, again) in self._names:
            again += 1
        name = file_name(self.part, first, last, again)
        by_path: dict[str, list[pa.Table]] = {}
        for table, schema in self._schemas.items():
            schema = schema.with_metadata({ABOUT: json.dumps(about)})
            by_path[f"{self.folder.path}/{table}/{name}"] = [
                pa.Table.from_batches([_batch(layout, row, schema) for row in kept], schema)
                for layout in self._layouts
                if layout.table == table
            ]
        self._names.add((first, again))
        self._left = list(by_path)
        self.folder.write_tables(by_path)
        self._left = []

    def _sweep(self) -> None:
        """Remove what a flush that failed has left: its steps may come again."""
        self.folder.fs.invalidate_cache()
        for path in self._left:
            if self.folder.fs.exists(path):
                self.folder.remove(path)
        self._left = []

    def truncate_after(self, step: int, also: Callable[[str], bool] = lambda part: False) -> None:
        """Forget the steps after `step`, on disk and in memory; of the parts that `also` says yes to, too."""
        self._kept = [row for row in self._kept if row.step <= step]
        self.flush()
        truncate(self.folder, step, lambda part: part == self.part or also(part))
        self._names = {(file.first, file.again) for file in self.folder.files(self.part)}
        self._registered = None

    def close(self) -> None:
        """Write what is left."""
        self.flush()

    def _write_registry(self, step: int) -> None:
        """Say what the slots mean from `step` on, unless a file says so already."""
        if self._registered is not None and self._registered <= step:
            return
        files = self.folder.registry_files(self.part)
        before = [(file, known) for file, known in self.folder.read_registries(self.part) if file.first <= step]
        identities = [known.identity for _, known in before]
        # Late frames of several ranks take turns; theirs need be known once. A vital registry is in force until the next one.
        in_force = identities if self._late and not self.registry.vital_slots else identities[-1:]
        if self.registry.identity not in in_force:
            name = before[-1][0].path.rpartition("/")[2] if before else None
            again = max((file.again + 1 for file in files if file.first == step), default=0)
            text = json.dumps(self.registry.to_dict() | {"follows": name}, indent=1)
            self.folder.write_bytes(self.folder.registry_path(self.part, step, again), text.encode())
        self._registered = step


def truncate(folder: Folder, step: int, chosen: Callable[[str], bool]) -> None:
    """Drop the steps after `step` from the parts that `chosen` says yes to."""
    for file in folder.files():
        if not chosen(file.part) or file.last <= step:
            continue
        if file.first <= step:
            try:
                about = read_about(folder, file)
                with folder.fs.open(file.path) as opened:
                    table = pq.read_table(opened)
            except TORN as error:
                folder.put_aside(file.path, error)
                continue
            coverage = Coverage(about["steps"])
            coverage.truncate_after(step)
            metadata = {ABOUT: json.dumps(about | {"steps": coverage.to_json()})}
            table = table.filter(pc.field("step") <= step).unify_dictionaries().replace_schema_metadata(metadata)
            name = file_name(file.part, file.first, step, file.again)
            folder.write_tables({f"{folder.path}/{file.table}/{name}": [table]})
        folder.remove(file.path)
    for file in folder.registry_files():
        if chosen(file.part) and file.first > step:
            folder.remove(file.path)


def recover(folder: Folder, part: str) -> tuple[Coverage, int]:
    """What a part has on disk, and the attempt of the run that it is of; a flush that was cut short is removed, a torn one put aside.

    To be called by the part's own writer, before it writes.
    """
    coverage, attempt = Coverage(), 0
    flushes: dict[tuple[int, int], list[File]] = {}
    for file in folder.files(part):
        flushes.setdefault((file.first, file.again), []).append(file)
    for files in flushes.values():
        try:
            about, *_ = [read_about(folder, file) for file in files]
        except TORN as error:
            for file in files:  # its steps may come again
                folder.put_aside(file.path, error)
            continue
        if {file.table for file in files} != set(about["tables"]):
            for file in files:
                folder.remove(file.path)
            continue
        coverage.update(Coverage(about["steps"]))
        attempt = max(attempt, about["attempt"])
    return coverage, attempt


def steps_in(folder: str | Path, part: str = "*") -> dict[int, frozenset[int]]:
    """Steps on disk, rising, with the ranks whose values are there; `part` is a pattern."""
    return dict(covered(Folder.at(folder), lambda name: fnmatchcase(name, part)))


def covered(folder: Folder, chosen: Callable[[str], bool]) -> Coverage:
    """What the parts that `chosen` says yes to have on disk. Files that are torn are passed over."""
    coverage = Coverage()
    for file in {(file.part, file.first, file.again): file for file in folder.files()}.values():
        if chosen(file.part):
            with suppress(*TORN):
                coverage.update(Coverage(read_about(folder, file)["steps"]))
    return coverage


def connect(folder: str | Path, locked: bool = False) -> "duckdb.DuckDBPyConnection":
    """A database in memory with a view a table of the plane in `folder`, a path or a URL.

    Files that are written later are seen, tables that do not exist yet are not: connect again for those. `locked`: it opens
    files of that folder alone, the views' own queries included.
    """
    import duckdb  # large, and nothing that writes needs it

    place = Folder.at(folder)
    connection = duckdb.connect()
    connection.execute("SET enable_progress_bar = false")
    if not place.local:
        connection.register_filesystem(place.fs)
    if locked:
        connection.execute(f"SET allowed_directories = ['{_escape(place.url)}/']")
        connection.execute("SET enable_external_access = false")
    known = registries(folder)
    for table in place.tables():
        by_registry = {frozenset(_statistics(registry, table)) for registry in known} - {frozenset()}
        # To look for columns in every file takes long where there are thousands: only where files have different ones.
        union = "true" if len(by_registry) > 1 else "false"
        source = f"read_parquet('{_escape(f'{place.url}/{table}/*.parquet')}', union_by_name = {union})"
        columns = [row[0] for row in connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()]
        connection.execute(f"CREATE VIEW {_quote(table)} AS {_view(table, source, columns, known)}")
    return connection


def vital_planes(folder: str | Path, after: int = 0) -> Iterator[tuple[int, Registry, np.ndarray]]:
    """Steps after `after` in order, each with its registry and vital plane, float32 [vital slots]; NaN: no value came."""
    known = [(first, registry) for first, _, registry in Folder.at(folder).registries() if registry.vital_slots]
    if not known:
        return
    connection, there = connect(folder), set(Folder.at(folder).tables())
    ends = [first - 1 for first, _ in known[1:]] + [np.iinfo(np.int64).max]
    for (first, registry), last in zip(known, ends, strict=True):
        grids = [(grid, [s for s in columns if s.vital]) for grid, columns in registry.grids().items()]
        tables = [table_name(grid) for grid, columns in grids if columns]
        if not set(tables) <= there:  # registered, and no file yet
            continue
        where = f"step BETWEEN {max(first, after + 1)} AND {last}"
        union = " UNION ".join(f"SELECT step FROM {_quote(table)} WHERE {where}" for table in set(tables))
        steps = np.array(connection.execute(f"{union} ORDER BY step").fetchall(), dtype=np.int64).ravel()
        at_once = max(1, _VALUES_AT_ONCE // registry.vital_slots)
        for start in range(0, len(steps), at_once):
            chunk = steps[start : start + at_once]
            yield from _read_vitals(connection, registry, chunk)


def registries(folder: str | Path) -> list[Registry]:
    """All registries of the plane, by rising first step."""
    return [registry for _, _, registry in Folder.at(folder).registries()]


def windows(folder: str | Path) -> dict[str, dict[tuple[int, int], Any]]:
    """Files by table and by their first and last step, each with a sign that changes when they do."""
    place = Folder.at(folder)
    found: dict[str, dict[tuple[int, int], Any]] = {}
    for file in place.files():
        of_table = found.setdefault(file.table, {})
        window = (file.first, file.last)
        of_table[window] = (*of_table.get(window, ()), (file.part, file.again, place.fs.size(file.path)))
    return found


def _layout(grid: Grid, statistics: list[Statistic]) -> _Layout:
    """Key columns of a grid, in the order of its slots."""
    cells, inner = statistics[0].count, statistics[0].count
    keys = {}
    for axis in grid:
        inner //= len(axis.values)
        keys[axis.name] = _key_column(axis, inner, cells)
    return _Layout(table=table_name(grid), statistics=statistics, keys=keys, cells=cells)


def _key_column(axis: Axis, inner: int, cells: int) -> pa.Array:
    """An axis' values along the grid: each `inner` times, over and over."""
    positions = np.resize(np.repeat(np.arange(len(axis.values), dtype=np.int32), inner), cells)
    if isinstance(axis.values[0], str):
        return pa.DictionaryArray.from_arrays(_column(positions, pa.int32()), pa.array(list(axis.values), pa.string()))
    return _column(np.array(axis.values, dtype=np.int32)[positions], pa.int32())


def _column(values: np.ndarray, kind: pa.DataType, valid: np.ndarray | None = None) -> pa.Array:
    """A column on the memory of `values`. `pa.array` would import pandas to look at it, which takes most of a second."""
    bits = None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little"))
    return pa.Array.from_buffers(kind, len(values), [bits, pa.py_buffer(values)])


def _schema(layouts: list[_Layout]) -> pa.Schema:
    """Columns of a table: step, axes, every statistic with its unit and reduction."""
    fields = {"step": pa.field("step", pa.int64())}
    fields |= {name: pa.field(name, column.type) for layout in layouts for name, column in layout.keys.items()}
    for statistic in (statistic for layout in layouts for statistic in layout.statistics):
        metadata = {"unit": statistic.unit, "reduction": statistic.reduction}
        fields[statistic.name] = pa.field(statistic.name, pa.float32(), metadata=metadata)
    return pa.schema(list(fields.values()))


def _batch(layout: _Layout, row: _Kept, schema: pa.Schema) -> pa.RecordBatch:
    """One step of one grid; columns of the table's other grids are null."""
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


def _read_vitals(
    connection: "duckdb.DuckDBPyConnection", registry: Registry, steps: np.ndarray
) -> Iterator[tuple[int, Registry, np.ndarray]]:
    """Vital planes of a few steps."""
    planes_SV = np.full((len(steps), registry.vital_slots), np.nan, np.float32)
    for grid, columns in registry.grids().items():
        vital = [statistic for statistic in columns if statistic.vital]
        if not vital:
            continue
        names = ["step", *(axis.name for axis in grid), *(statistic.name for statistic in vital)]
        rows = connection.execute(
            f"SELECT {', '.join(map(_quote, names))} FROM {_quote(table_name(grid))} "
            f"WHERE step BETWEEN {steps[0]} AND {steps[-1]}"
        ).fetchnumpy()
        cell, known = np.zeros(len(rows["step"]), np.int64), np.ones(len(rows["step"]), bool)
        for axis in grid:
            values = np.array(axis.values, dtype=object if isinstance(axis.values[0], str) else np.int64)
            order = np.argsort(values)
            found = np.ma.getdata(rows[axis.name])
            position = order[np.searchsorted(values, found, sorter=order).clip(max=len(values) - 1)]
            known &= values[position] == found
            cell = cell * len(values) + position
        row = np.searchsorted(steps, rows["step"])
        for statistic in vital:
            column = np.ma.filled(rows[statistic.name].astype(np.float32), np.nan)
            planes_SV[row[known], statistic.first + cell[known]] = column[known]
    for step, plane in zip(steps.tolist(), planes_SV, strict=True):
        yield step, registry, plane


def _view(table: str, source: str, columns: list[str], registries: list[Registry]) -> str:
    """The query behind a table's view."""
    statistics: dict[str, Statistic] = {}
    derived: dict[str, Derived] = {}
    for registry in registries:  # the newest definition of a name wins
        statistics |= _statistics(registry, table)
        derived |= {name: d for name, d in registry.derived.items() if table_name(registry.grid_of(name)) == table}
    reduced = [name for name in columns if name in statistics]
    keys = [name for name in columns if name not in statistics]
    inner = [_quote(key) for key in keys]
    inner += [f"{statistics[name].reduction}({_quote(name)}) AS {_quote(name)}" for name in reduced]
    outer = ["*"] + [
        f"{_formula(d)} AS {_quote(name)}"
        for name, d in derived.items()
        if all(column in reduced for column, _ in d.powers)
    ]
    return f"SELECT {', '.join(outer)} FROM (SELECT {', '.join(inner)} FROM {source} GROUP BY {', '.join(map(_quote, keys))})"


def _statistics(registry: Registry, table: str) -> dict[str, Statistic]:
    """Statistics of a table, by name."""
    return {name: statistic for name, statistic in registry.statistics.items() if table_name(statistic.grid) == table}


def _formula(derived: Derived) -> str:
    """A derived statistic; null where there is nothing to divide by."""
    product = " * ".join([repr(float(derived.scale)), *(f"pow({_quote(c)}, {float(p)!r})" for c, p in derived.powers)])
    return f"CASE WHEN isfinite({product}) THEN {product} END"


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _escape(text: str) -> str:
    return text.replace("'", "''")
