"""SQL over a plane: one view per table, which combines the parts and adds the derived columns.

    Database(folder).execute("SELECT step, layer, expert, activation_rms FROM layer_expert")

Parts are combined with the reduction of each statistic. A statement sees the files that count when it begins
(`files.live`). If one of them is merged and removed before it is read, the statement runs again over the files that
exist then.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import numpy as np

from steptron.monitor.statistics.reduction import RULES, derived_sql
from steptron.monitor.statistics.registry import Derived, Registry, Statistic, table_name
from steptron.monitor.storage.files import Folder

T = TypeVar("T")

TRIES = 5
"""The number of times that a statement is run if its files are merged and removed."""
_VALUES_AT_ONCE = 4_000_000
"""The number of values that `vital_planes` reads at a time."""


class Database:
    """A DuckDB database in memory with one view per table of the plane in `folder`. It is a context manager."""

    def __init__(self, folder: str | Path, locked: bool = False):
        """Open it.

        Args:
            folder: a path or a URL.
            locked: only files of that folder can be opened, also by the views' own queries.
        """
        self._place = Folder.at(folder)
        self.connection = duckdb.connect()
        """The connection, for settings only; to read the views, use `run` or `execute`."""
        self._files: dict[str, list[str]] = {}
        """The paths that the views refer to, by table."""
        self._listed: set[str] = set()
        """The paths found by the last listing, whether or not there are views of them yet."""
        self._registries: list[Any] = []
        self.connection.execute("SET enable_progress_bar = false")
        if not self._place.local:
            self.connection.register_filesystem(self._place.fs)
        if locked:
            self.connection.execute(f"SET allowed_directories = ['{_escape(self._place.url)}/']")
            self.connection.execute("SET enable_external_access = false")

    def run(self, act: Callable[[duckdb.DuckDBPyConnection], T]) -> T:
        """Call `act` with the connection and return its result; call it again if files are removed meanwhile.

        Raises `duckdb.Error`, and the errors of `act`.
        """
        for left in reversed(range(TRIES)):
            try:
                self._look()
                return act(self.connection)
            except duckdb.InterruptException:
                raise
            except (duckdb.Error, OSError):
                if not left or not self._gone():
                    raise
        raise AssertionError("the last try returns or raises")

    def execute(self, sql: str, parameters: Sequence[Any] | None = None) -> duckdb.DuckDBPyConnection:
        """Run a statement and return an object to fetch its rows from. Raises `duckdb.Error`."""
        return self.run(lambda connection: connection.execute(sql, parameters))

    def close(self) -> None:
        """Close the database."""
        self.connection.close()

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _look(self) -> None:
        """Make the views refer to the files that count now."""
        found: dict[str, list[str]] = {}
        for file in self._place.files():
            found.setdefault(file.table, []).append(file.path)
        self._listed = {path for paths in found.values() for path in paths}
        known = self._place.registry_files()
        if found == self._files and known == self._registries:
            return
        everything = known != self._registries
        every = [registry for _, _, registry in self._place.registries()]
        for table in [table for table in self._files if table not in found]:
            self.connection.execute(f"DROP VIEW {quote(table)}")
        for table, paths in found.items():
            if everything or paths != self._files.get(table):
                self._lay(table, paths, every)
        self._files, self._registries = found, known

    def _lay(self, table: str, paths: Sequence[str], every: list[Registry]) -> None:
        """Create the view of a table."""
        by_registry = {frozenset(_statistics(registry, table)) for registry in every} - {frozenset()}
        # Looking for columns in every file takes long if there are thousands, so do it only if files differ in columns.
        union = "true" if len(by_registry) > 1 else "false"
        urls = ", ".join(f"'{_escape(self._place.url_of(path))}'" for path in paths)
        source = f"read_parquet([{urls}], union_by_name = {union})"
        columns = [row[0] for row in self.connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()]
        self.connection.execute(f"CREATE OR REPLACE VIEW {quote(table)} AS {_view(table, source, columns, every)}")

    def _gone(self) -> bool:
        """Return whether a file that was found no longer exists."""
        return not self._listed <= {file.path for file in self._place.listed()}


def vital_planes(folder: str | Path, after: int = 0) -> Iterator[tuple[int, Registry, np.ndarray]]:
    """Yield the steps after `after` in order, with registry and vital plane, float32 [vital slots].

    NaN marks a value that was not stored. A step without any stored value is left out.
    """
    known = [(first, registry) for first, _, registry in Folder.at(folder).registries() if registry.vital_slots]
    if not known:
        return
    connection, there = Database(folder), set(Folder.at(folder).tables())
    ends = [first - 1 for first, _ in known[1:]] + [np.iinfo(np.int64).max]
    for (first, registry), last in zip(known, ends, strict=True):
        grids = [(grid, [s for s in columns if s.vital]) for grid, columns in registry.grids().items()]
        tables = [table_name(grid) for grid, columns in grids if columns]
        if not set(tables) <= there:  # registered, but without a file
            continue
        where = f"step BETWEEN {max(first, after + 1)} AND {last}"
        union = " UNION ".join(f"SELECT step FROM {quote(table)} WHERE {where}" for table in set(tables))
        steps = np.array(connection.execute(f"{union} ORDER BY step").fetchall(), dtype=np.int64).ravel()
        at_once = max(1, _VALUES_AT_ONCE // registry.vital_slots)
        for start in range(0, len(steps), at_once):
            chunk = steps[start : start + at_once]
            yield from _read_vitals(connection, registry, chunk)


def _read_vitals(
    connection: Database, registry: Registry, steps: np.ndarray
) -> Iterator[tuple[int, Registry, np.ndarray]]:
    """Yield the vital planes of a few steps."""
    planes_SV = np.full((len(steps), registry.vital_slots), np.nan, np.float32)
    for grid, columns in registry.grids().items():
        vital = [statistic for statistic in columns if statistic.vital]
        if not vital:
            continue
        names = ["step", *(axis.name for axis in grid), *(statistic.name for statistic in vital)]
        rows = connection.execute(
            f"SELECT {', '.join(map(quote, names))} FROM {quote(table_name(grid))} "
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
        # Only rank 0 stores vital values. If it has dropped a step, the rows of other ranks remain.
        if not np.isnan(plane).all():
            yield step, registry, plane


def _view(table: str, source: str, columns: list[str], registries: list[Registry]) -> str:
    """The query behind a table's view."""
    statistics: dict[str, Statistic] = {}
    derived: dict[str, Derived] = {}
    for registry in registries:  # the newest definition of a name counts
        statistics |= _statistics(registry, table)
        derived |= {name: d for name, d in registry.derived.items() if table_name(registry.grid_of(name)) == table}
    reduced = [name for name in columns if name in statistics]
    keys = [name for name in columns if name not in statistics]
    inner = [quote(key) for key in keys]
    inner += [f"{RULES[statistics[name].reduction].sql.format(quote(name))} AS {quote(name)}" for name in reduced]
    outer = ["*"] + [
        f"{derived_sql(d.powers, quote)} AS {quote(name)}"
        for name, d in derived.items()
        if all(column in reduced for column, _ in d.powers)
    ]
    return (
        f"SELECT {', '.join(outer)} "
        f"FROM (SELECT {', '.join(inner)} FROM {source} GROUP BY {', '.join(map(quote, keys))})"
    )


def _statistics(registry: Registry, table: str) -> dict[str, Statistic]:
    """Return the statistics of a table by name."""
    return {name: statistic for name, statistic in registry.statistics.items() if table_name(statistic.grid) == table}


def quote(name: str) -> str:
    """Return a name quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


def _escape(text: str) -> str:
    return text.replace("'", "''")
