"""A reader of the plane for the pages: it reads while the run writes, coarsely first, with bounded memory.

    metrics/TABLE/*.parquet ─► windows: a table's steps in pieces of one length ─► row groups with a part of a window
        ─► dense arrays [steps, columns, cells] ─► downsample.Spans ─► the page's documents (`heatmap.py`)

A window is read once; the newest windows are read again when their files change. The borders of files do not matter,
because files are merged as the run continues. When the plane becomes shorter (a resumed or rewound run drops steps),
everything is read again. Axes: S steps, C columns, then the axes of the table.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from steptron.monitor.statistics import downsample, summary
from steptron.monitor.statistics.reduction import RULES, Reduction, derived
from steptron.monitor.statistics.registry import Derived, Registry, table_name
from steptron.monitor.storage.files import File, Folder

CELL_VALUES = 800_000
"""The largest number of values that a statistic of cells (layer × expert) keeps over all its slices of time."""
NAMED_VALUES = 400_000
"""The largest number of values that a table of names (parameters, ranks, layers) keeps over all columns and spans."""
MAX_SLICES = 120
"""The number of positions of the heat map's slider."""
MAX_SPANS = 300
"""The number of points of a curve."""
WINDOW_STEPS = 64
"""The least number of steps of a window."""
WINDOW_ROWS = 1 << 15
"""The approximate number of rows of a window that has more steps than the least."""
MAX_WINDOWS = 240
"""The largest number of windows of a table that are read; of more, every n-th is read."""
MAX_ROWS = 400_000
"""The largest number of rows of a table and window that are read, from its last steps."""
FRESH = 2
"""The least number of newest windows that may still grow."""
MAX_FRESH = 24
"""The largest number of newest windows that may still grow, with long flushes."""
_TRIES = 5
"""The number of times that a refresh starts again if files are merged and removed meanwhile."""

log = logging.getLogger(__name__)

Window = tuple[int, int]
"""The first and the last step of a window."""


@dataclass
class WindowValues:
    """The steps of one table, by series: the input of `downsample.Spans.add`."""

    steps: np.ndarray
    stages: np.ndarray
    mean: downsample.Series
    spread: downsample.Series


@dataclass
class View:
    """The data that is kept of one table."""

    name: str
    """The name of the table: `layer_expert`, `parameter` or another."""
    axes: list[tuple[str, list[int | str]]]
    """The name and the values of each axis."""
    columns: list[tuple[str, str]]
    """The name and the unit of each statistic that is shown."""
    formulas: dict[str, str | Derived]
    """The formula of each statistic: a stored one, or one derived from stored ones."""
    raw: dict[str, Reduction]
    """The stored statistics from which the columns are computed."""
    width: int
    """The number of steps of a window."""
    settled: tuple[downsample.Spans, downsample.Spans]
    """The windows that no longer change: `sum` and `count` [C, cells…]; `high` and `low` [C, rows], if there are two
    axes."""
    read: set[Window] = field(default_factory=set)
    """The windows that are in `settled`."""
    fresh: dict[Window, tuple[list[File], WindowValues]] = field(default_factory=dict)
    """The newest windows, with the files they were read from."""
    revision: int = 0
    """A number that grows as more is read."""

    def spans(self) -> tuple[downsample.Spans, downsample.Spans]:
        """Return all spans that are known."""
        mean, spread = (spans.copy() for spans in self.settled)
        for _, block in self.fresh.values():
            _take((mean, spread), block)
        return mean, spread


class PlaneReader:
    """The reader of one run's plane. It must not be used by several threads at once."""

    def __init__(self, folder: str):
        self._folder = Folder.at(folder)
        self._url = folder
        self._identity: Any = None
        self._last = 0
        self.views: dict[str, View] = {}
        self.generation = 0
        """A number that grows when everything is read anew."""

    def poll(self, stage_starts: Sequence[int], epoch: int = 0, budget_s: float | None = None) -> bool:
        """Read what is new, newest windows first, then from coarse to fine, until `budget_s` is spent.

        Args:
            stage_starts: first step of each run of steps of one stage, ascending.
            epoch: if it differs from the last call, everything is read again.
            budget_s: None: until everything is read.

        Returns:
            Whether something remains to be read.
        """
        for _ in range(_TRIES):
            try:
                return self._poll(np.asarray(stage_starts, dtype=np.int64), epoch, budget_s)
            except FileNotFoundError:  # merged and removed since it was listed
                continue
            except OSError as error:
                log.warning("%s cannot be listed: %s", self._url, error)
                return False
        return True

    def _poll(self, starts: np.ndarray, epoch: int, budget_s: float | None) -> bool:
        """Do the work of `poll`. Raises OSError."""
        files, found = self._folder.files(), self._folder.registries()
        last = max((file.last for file in files), default=0)
        identity = (epoch, [(first, part, registry.identity) for first, part, registry in found])
        if identity != self._identity or last < self._last:
            self.views, self._identity = {}, identity
            self.generation += 1
        self._last = last
        if not found or not files:
            return False
        if not self.views:
            self.views = _views([registry for _, _, registry in found], last)
        windows = {
            name: _windows([file for file in files if file.table == name], view.width)
            for name, view in self.views.items()
        }
        started, todo = time.monotonic(), self._todo(windows)
        for position, (name, window, settled) in enumerate(todo):
            self._read(self.views[name], window, windows[name][window], settled, starts)
            if budget_s is not None and time.monotonic() - started > budget_s:
                return position + 1 < len(todo)
        return False

    def _todo(self, windows: Mapping[str, Mapping[Window, list[File]]]) -> list[tuple[str, Window, bool]]:
        """Return the windows to read, in order, and whether each no longer changes."""
        ranked = []
        for name, view in self.views.items():
            known = windows.get(name, {})
            ordered = sorted(known)
            newest = set(ordered[-_growing(known, view.width) :])
            for window in [window for window in view.fresh if window not in newest]:
                files, block = view.fresh.pop(window)
                if files == known.get(window):
                    view.read.add(window)
                    _take(view.settled, block)
            for window in newest:
                if view.fresh.get(window, (None,))[0] != known[window]:
                    ranked.append((-1, name, window, False))
            for rank, window in _coarse_first(ordered):
                if window not in newest and window not in view.read:
                    ranked.append((rank, name, window, True))
        return [row[1:] for row in sorted(ranked)]

    def _read(self, view: View, window: Window, files: list[File], settled: bool, starts: np.ndarray) -> None:
        """Read one window of one table."""
        steps, dense = _dense(self._folder, window, files, view)
        block = _block(steps, dense, np.searchsorted(starts, steps, side="right"), len(view.axes) == 2)
        if settled:
            view.read.add(window)
            _take(view.settled, block)
        else:
            view.fresh[window] = (files, block)
        view.revision += 1


def _take(spans: tuple[downsample.Spans, downsample.Spans], block: WindowValues) -> None:
    spans[0].add(block.steps, block.stages, block.mean)
    if block.spread:
        spans[1].add(block.steps, block.stages, block.spread)


def _block(steps: np.ndarray, dense: np.ndarray, stages: np.ndarray, with_spread: bool) -> WindowValues:
    known = np.isfinite(dense)
    block = WindowValues(steps, stages, {}, {})
    block.mean["sum"] = ("sum", np.where(known, dense, np.float32(0)))
    block.mean["count"] = ("sum", known.astype(np.float32))
    if with_spread:
        high, low = downsample.spread(dense)
        block.spread |= {"high": ("max", high.astype(np.float32)), "low": ("min", low.astype(np.float32))}
    return block


def _windows(files: Sequence[File], width: int) -> dict[Window, list[File]]:
    """Return the windows of `width` steps, each with every file that has a part of it."""
    windows: dict[Window, list[File]] = {}
    for file in files:
        for number in range(file.first // width, file.last // width + 1):
            windows.setdefault((number * width, (number + 1) * width - 1), []).append(file)
    return windows


def _growing(windows: Mapping[Window, list[File]], width: int) -> int:
    """Return the number of newest windows that may grow: those within two flushes, because parts write at different
    times."""
    flush = max((file.last + 1 - file.first for of in windows.values() for file in of if not file.merged), default=0)
    return min(MAX_FRESH, max(FRESH, -(-2 * flush // width)))


def _dense(folder: Folder, window: Window, files: Sequence[File], view: View) -> tuple[np.ndarray, np.ndarray]:
    """Return steps [S] and values [S, C, axes…] of one window, parts of which are in `files`. NaN where there is no
    value.

    Parts are combined by each statistic's reduction, as `store.connect` does for a whole folder. Here the files are
    known, so that no others need to be opened, and a torn one costs only itself.
    """
    shape = [len(values) for _, values in view.axes]
    cells = int(np.prod(shape))
    last = window[1]
    first = max(window[0], last + 1 - max(1, MAX_ROWS // cells))
    raw = {
        name: np.full((last + 1 - first, cells), RULES[kind].nothing, dtype=np.float32)
        for name, kind in view.raw.items()
    }
    seen = {name: np.zeros((last + 1 - first) * cells, dtype=bool) for name in raw}
    for file in files:
        try:
            with folder.fs.open(file.path) as opened:
                parquet = pq.ParquetFile(opened)
                names = [name for name in raw if name in parquet.schema_arrow.names]
                groups = _groups(parquet, first, last)
                table = parquet.read_row_groups(groups, ["step", *(axis for axis, _ in view.axes), *names])
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            log.warning("%s cannot be read, and is left out: %s", file.path, str(error).splitlines()[0])
            continue
        step = table["step"].to_numpy()
        table = table.filter(pa.array((step >= first) & (step <= last)))
        cell = np.zeros(len(table), dtype=np.int64)
        for axis, values in view.axes:
            cell = cell * len(values) + _positions(table[axis], values)
        place = (table["step"].to_numpy() - first) * cells + cell
        for name in names:
            known = table[name].is_valid().to_numpy()
            values = table[name].to_numpy()
            RULES[view.raw[name]].combine.at(raw[name].reshape(-1), place[known], values[known])
            seen[name][place[known]] = True
    for name, values in raw.items():
        values.reshape(-1)[~seen[name]] = np.nan
    there = np.flatnonzero(np.logical_or.reduce([np.isfinite(values).any(axis=1) for values in raw.values()]))
    with np.errstate(over="ignore"):
        columns = [_shown(raw, view.formulas[name])[there] for name, _ in view.columns]
    dense = np.stack(columns, axis=1).reshape(len(there), len(columns), *shape)
    dense[~np.isfinite(dense)] = np.nan
    return there + first, dense


def _groups(parquet: pq.ParquetFile, first: int, last: int) -> list[int]:
    """Return the row groups that may have steps from `first` to `last`."""
    column = parquet.schema_arrow.names.index("step")
    every = [parquet.metadata.row_group(group).column(column).statistics for group in range(parquet.num_row_groups)]
    return [n for n, known in enumerate(every) if known is None or (known.min <= last and known.max >= first)]


def _shown(raw: dict[str, np.ndarray], formula: str | Derived) -> np.ndarray:
    """Return a statistic as stored, or computed from stored ones."""
    if isinstance(formula, str):
        return raw[formula]
    return derived(formula.powers, raw.__getitem__).astype(np.float32)


def _positions(column: pa.ChunkedArray, values: Sequence[int | str]) -> np.ndarray:
    """Return the position of each entry among an axis's values."""
    place = {value: position for position, value in enumerate(values)}
    encoded = column.unify_dictionaries() if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    parts = [
        np.array([place[kind] for kind in chunk.dictionary.to_pylist()], dtype=np.int64)[chunk.indices.to_numpy()]
        for chunk in encoded.chunks
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _coarse_first(windows: Sequence[Window]) -> list[tuple[int, Window]]:
    """Return windows with a rank, lowest first: the first, then halves, quarters, … of the run; at most `MAX_WINDOWS`.

    They are counted from the start of the run, so that the choice stays the same while the run grows.
    """
    finest = 1
    while finest * MAX_WINDOWS < len(windows):
        finest *= 2
    stride = 1 << len(windows).bit_length()
    ranks: dict[int, int] = {}
    rank = 0
    while stride >= finest:
        for position in range(0, len(windows), stride):
            ranks.setdefault(position, rank)
        rank, stride = rank + 1, stride // 2
    return [(rank, windows[position]) for position, rank in ranks.items()]


def _views(registries: Sequence[Registry], last_step: int) -> dict[str, View]:
    """Return empty views of the tables that pages show: those with one axis, and those by layer and something else."""
    views = {}
    for name in dict.fromkeys(table_name(grid) for registry in registries for grid in registry.grids()):
        axes = _axes(registries, name)
        columns = list(dict.fromkeys(column for registry in registries for column in _columns(registry, name)))
        if not columns or len(axes) not in (1, 2):
            continue
        cells = int(np.prod([len(values) for _, values in axes]))
        limits = (min(MAX_SPANS, max(20, NAMED_VALUES // (cells * len(columns)))) // 2, 1)
        if len(axes) == 2:
            rows = len(axes[0][1])
            limits = (
                min(MAX_SLICES, max(20, CELL_VALUES // cells)) // 2,
                min(MAX_SPANS, max(40, NAMED_VALUES // (rows * len(columns)))) // 2,
            )
        mean, spread = (downsample.Spans(limit, _stride(last_step, limit)) for limit in limits)
        formulas, raw = _ingredients(registries, [column for column, _ in columns])
        width = max(WINDOW_STEPS, 1 << max(0, (WINDOW_ROWS // cells).bit_length() - 1))
        views[name] = View(name, axes, columns, formulas, raw, width, (mean, spread))
    return views


def _columns(registry: Registry, table: str) -> list[tuple[str, str]]:
    """Return name and unit of the statistics of a table that pages show."""
    every = registry.statistics | registry.derived
    return [(name, every[name].unit) for of, name in summary.shown(registry) if of == table]


def _ingredients(
    registries: Sequence[Registry], columns: Sequence[str]
) -> tuple[dict[str, str | Derived], dict[str, Reduction]]:
    """Return the inputs of the columns, and how parts of them are combined, from the newest registry that knows one."""
    formulas: dict[str, str | Derived] = {}
    raw: dict[str, Reduction] = {}
    for registry in registries:
        for name in columns:
            derived = registry.derived.get(name)
            if derived is not None or name in registry.statistics:
                formulas[name] = derived or name
                stored = [column for column, _ in derived.powers] if derived else [name]
                raw |= {column: registry.statistics[column].reduction for column in stored}
    return formulas, raw


def _stride(last_step: int, limit: int) -> int:
    """Return the number of steps that a span starts with, so that the present run fits: a power of two."""
    return 1 << max(0, (last_step // (2 * limit)).bit_length())


def _axes(registries: Sequence[Registry], table: str) -> list[tuple[str, list[int | str]]]:
    """Return the axes of a table. A position that several registries have appears once."""
    axes: dict[str, dict[int | str, None]] = {}
    for registry in registries:
        for grid in registry.grids():
            if table_name(grid) == table:
                for axis in grid:
                    axes.setdefault(axis.name, {}).update(dict.fromkeys(axis.values))
    return [(name, _in_order(list(values))) for name, values in axes.items()]


def _in_order(values: list[int | str]) -> list[int | str]:
    """Return numbers in ascending order; names keep the order of the registries."""
    return sorted(values) if all(isinstance(value, int) for value in values) else values  # pyright: ignore
