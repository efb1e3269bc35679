"""Maintenance of a plane's files: merge them, cut them at a step, and repair them after a crash.

    flush 1 … flush 8 ─► 1-8     eight of these ─► 1-64     …: a table has at most 7 files per level, and a few new

A merge writes the merged file of every table under a temporary name, syncs the files, renames them one after the other,
and removes the inputs later. In each table the rename makes the inputs void (`files.live`). So a reader finds each row
once, whenever it lists the files, and at whatever point a writer is killed. The inputs are removed after the next
merge, or after `GRACE_S`, so that queries that have listed them can finish. Files of more than `MERGED_BYTES` are not
merged further.
"""

import json
import logging
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from steptron.monitor.storage.coverage import Coverage
from steptron.monitor.storage.files import ABOUT, TORN, File, FileContent, Folder, file_name, live, read_about

FANOUT = 8
"""The number of files that are merged into one."""
MERGED_BYTES = 256 << 20
"""The largest size of merged flushes in bytes, over all tables."""
GRACE_S = 60.0
"""The seconds that merged inputs stay if no further merge removes them."""
CLOSE_S = 10.0
"""The seconds that a writer waits at its end for merges that are due."""
_MERGED_GROUP_ROWS = 1 << 16
"""The least number of rows in a row group of a merged file: readers of a few steps skip the other groups."""

log = logging.getLogger("steptron.monitor")


class _StoppedError(Exception):
    """Raised when another thread needs the files."""


class Compactor:
    """Merges the files of one part, in a thread of its own.

    Nothing waits for it: what is not done now is done later.
    """

    def __init__(self, folder: Folder, part: str, files: Sequence[File]):
        """Take the part's files that count; merging begins only with `add`."""
        self._folder, self._part = folder, part
        self._files = list(files)
        self._new: queue.SimpleQueue[Sequence[File]] = queue.SimpleQueue()
        self._retired: list[File] = []
        """The inputs of finished merges."""
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()
        """The lock for merging, removing and cutting files."""
        self._wake, self._stop = threading.Event(), threading.Event()
        self._closing = self._failed = False
        self._pause = 0
        """The number of wake-ups to skip after a merge that failed."""
        self._thread: threading.Thread | None = None

    def add(self, files: Sequence[File]) -> None:
        """Take the files of a finished flush."""
        self._new.put(files)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="compaction", daemon=True)
            self._thread.start()
        self._wake.set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Stop a merge in progress, and start none within the context.

        Afterwards, the part's files are listed again.
        """
        self._stop.set()
        with self._lock:
            self._stop.clear()
            self._forget()  # if the caller fails, nothing is merged, because the files that exist are unknown
            yield
            self._files = self._folder.listed(self._part)

    def close(self) -> None:
        """Do the merges that are due within `CLOSE_S`, and remove merged inputs."""
        self._end(CLOSE_S)
        self._remove(self._retired)

    def abandon(self) -> None:
        """Stop, and do not touch the files any more: another run owns them."""
        self._stop.set()
        self._end(0.0)
        self._forget()

    def _forget(self) -> None:
        """Forget all files."""
        self._take()
        self._files, self._retired, self._sizes = [], [], {}

    def _take(self) -> None:
        """Take in the files of new flushes."""
        while not self._new.empty():
            self._files += self._new.get()

    def _end(self, patience_s: float) -> None:
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(patience_s)
            self._stop.set()
            self._thread.join()
        self._thread, self._closing = None, False
        self._stop.clear()

    def _work(self) -> None:
        while True:
            idle = not self._wake.wait(GRACE_S if self._retired else None)
            self._wake.clear()
            with self._lock:
                before = list(self._retired)
                try:
                    if self._merge_all() or idle:
                        self._remove(before)
                except _StoppedError:
                    pass
                except Exception as error:  # remote file systems may raise anything; the files are still valid
                    self._pause = FANOUT
                    if not self._failed:
                        log.warning(
                            "%s: files of %s cannot be merged: %s; they stay, and it is tried again later",
                            *(self._folder.path, self._part, error),
                        )
                    self._failed = True
            if self._closing and not self._wake.is_set():
                return

    def _merge_all(self) -> bool:
        """Do all merges that are due. Return whether there were any."""
        self._take()
        if self._pause:
            self._pause -= 1
            return False
        found = False
        while files := due(self._files, self._size):
            merged = merge(self._folder, files, self._go_on)
            self._files = [*(file for file in self._files if file not in files), *merged]
            self._retired += files
            found = True
        return found

    def _go_on(self) -> None:
        """Raise `_StoppedError` if another thread needs the files."""
        if self._stop.is_set():
            raise _StoppedError

    def _size(self, file: File) -> int:
        if file.path not in self._sizes:
            self._sizes[file.path] = self._folder.fs.size(file.path)
        return self._sizes[file.path]

    def _remove(self, files: Iterable[File]) -> None:
        """Remove inputs; one that cannot be removed is tried again later, and does not count meanwhile."""
        for file in list(files):
            try:
                with suppress(FileNotFoundError):
                    self._folder.remove(file.path)
            except Exception as error:  # remote file systems may raise anything
                log.warning("%s is merged, and cannot be removed: %s", file.path, error)
                return
            self._retired.remove(file)
            self._sizes.pop(file.path, None)


def due(files: Iterable[File], size: Callable[[File], int]) -> list[File]:
    """Return the files of one part, of all tables, that must be merged next; none if no merge is due.

    Level l has files of 8^l flushes and more. `FANOUT` consecutive files of one level are due, with smaller ones in
    between.
    """
    flushes: dict[tuple[int, int], list[File]] = {}
    for file in live(files):
        if file.end:
            flushes.setdefault((file.start, file.end), []).append(file)
    ordered = [flushes[key] for key in sorted(flushes)]
    levels = [int(math.log(of[0].end - of[0].start + 1, FANOUT) + 1e-9) for of in ordered]
    for level in range(max(levels, default=-1) + 1):
        first = 0
        for stop in [n for n, one in enumerate(levels) if one > level] + [len(levels)]:
            here = [n for n in range(first, stop) if levels[n] == level]
            if len(here) >= FANOUT and (chosen := _fitting(ordered[first : here[-1] + 1], size)):
                return [file for flush in chosen for file in flush]
            first = stop + 1
    return []


def _fitting(run: list[list[File]], size: Callable[[File], int]) -> list[list[File]]:
    """Return the first flushes of a run that are worth merging and have at most `MERGED_BYTES`."""
    bytes_of = [sum(map(size, of)) for of in run]
    first = 0
    while first < len(run):
        stop, total = first, 0
        while stop < len(run) and total + bytes_of[stop] <= MERGED_BYTES:
            total += bytes_of[stop]
            stop += 1
        if stop - first >= (FANOUT if stop == len(run) else 2):
            return run[first:stop]
        first = max(stop, first + 1)
    return []


def merge(folder: Folder, files: Sequence[File], go_on: Callable[[], None] = lambda: None) -> list[File]:
    """Write the files of some flushes as one file per table, and return these; the caller must remove the inputs.

    `go_on` is called repeatedly; an exception that it raises ends the merge and leaves nothing behind.
    """
    start, end = min(file.start for file in files), max(file.end for file in files)
    first, last = min(file.first for file in files), max(file.last for file in files)
    part = files[0].part
    by_table: dict[str, list[File]] = {}
    for file in sorted(files, key=lambda file: file.start):
        by_table.setdefault(file.table, []).append(file)
    flushes = {file.start: file for file in reversed(files)}
    about = _about_all([read_about(folder, flushes[number]) for number in sorted(flushes)])
    name = file_name(part, first, last, start, end)
    merged = [File(f"{folder.path}/{table}/{name}", table, part, first, last, start, end) for table in by_table]
    rows = {
        file.path: _rows(folder, inputs, about, go_on) for file, inputs in zip(merged, by_table.values(), strict=True)
    }
    try:
        folder.write_tables(rows, durable=True)
    except Exception:
        for path in rows:  # all inputs exist
            with suppress(Exception):
                folder.remove(path)
        raise
    return merged


def _about_all(every: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the metadata of a merged file."""
    coverage = Coverage()
    for about in every:
        coverage.update(Coverage(about["steps"]))
    tables = list(dict.fromkeys(table for about in every for table in about["tables"]))
    return {"steps": coverage.to_json(), "tables": tables, "attempt": max(about["attempt"] for about in every)}


def _rows(
    folder: Folder,
    files: Sequence[File],
    about: dict[str, Any],
    go_on: Callable[[], None] = lambda: None,
    last: int | None = None,
) -> FileContent:
    """Return the rows of some files of one table, up to step `last`; columns that a file lacks are null."""
    schemas = []
    for file in files:
        with folder.fs.open(file.path) as opened:
            schemas.append(pq.read_schema(opened))
    schema = pa.unify_schemas(schemas).with_metadata({ABOUT: json.dumps(about)})
    return FileContent(schema=schema, tables=_stream(folder, files, schema, go_on, last))


def _stream(
    folder: Folder, files: Sequence[File], schema: pa.Schema, go_on: Callable[[], None], last: int | None
) -> Iterator[pa.Table]:
    """Yield rows in the order of the files, in tables large enough for a row group.

    Only one row group of the files is in memory at a time.
    """
    waiting: list[pa.Table] = []
    for file in files:
        with folder.fs.open(file.path) as opened:
            parquet = pq.ParquetFile(opened)
            for group in range(parquet.num_row_groups):
                go_on()
                table = parquet.read_row_group(group)
                if last is not None:
                    table = table.filter(pc.field("step") <= last)
                waiting.append(table)
                if sum(map(len, waiting)) >= _MERGED_GROUP_ROWS:
                    yield _together(waiting, schema)
                    waiting = []
    if waiting:
        yield _together(waiting, schema)


def _together(tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    table = pa.concat_tables(tables, promote_options="default")
    missing = [field for field in schema if field.name not in table.schema.names]
    for field in missing:
        table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(schema.names).unify_dictionaries().combine_chunks().cast(schema)


def settle(folder: Folder, files: Sequence[File]) -> list[File]:
    """Finish what a killed writer has begun with all listed files of a part. Return the files that remain.

    A merge without a file in every table is undone; all its inputs exist. Files that no longer count are removed. Only
    a process that may write the part may call this.
    """
    counting = live(files)
    while undone := [file for file in counting if file.merged and _is_cut_short(file, counting)]:
        for file in undone:
            folder.remove(file.path)
        files = [file for file in files if file not in undone]
        counting = live(files)
    for file in files:
        if file not in counting:
            folder.remove(file.path)
    return counting


def _is_cut_short(merged: File, counting: Sequence[File]) -> bool:
    """Return whether some table still has inputs of this merge that count."""
    return any(merged.holds(file) and file.table != merged.table for file in counting)


def truncate(folder: Folder, step: int, chosen: Callable[[str], bool]) -> None:
    """Drop the steps after `step` from the parts that `chosen` accepts."""
    by_part: dict[str, list[File]] = {}
    for file in folder.listed():
        if chosen(file.part):
            by_part.setdefault(file.part, []).append(file)
    for files in by_part.values():
        settle(folder, files)
    for file in folder.files() if by_part else ():
        if chosen(file.part) and file.last > step:
            _truncate(folder, file, step)
    for file in folder.registry_files():
        if chosen(file.part) and file.first > step:
            folder.remove(file.path)


def _truncate(folder: Folder, file: File, step: int) -> None:
    """Drop the later steps of a file; remove the file if no step is left."""
    if file.first <= step:
        try:
            about = read_about(folder, file)
            coverage = Coverage(about["steps"])
            coverage.truncate_after(step)
            rows = _rows(folder, [file], about | {"steps": coverage.to_json()}, last=step)
            name = file_name(file.part, file.first, step, file.start, file.end)
            folder.write_tables({f"{folder.path}/{file.table}/{name}": rows}, durable=True)
        except TORN as error:
            folder.put_aside(file.path, error)
            return
    folder.remove(file.path)


def recover(folder: Folder, part: str) -> tuple[Coverage, int]:
    """Return the state of a part on disk, and the attempt of the run to which it belongs.

    A flush that was interrupted is removed, and an incomplete file is renamed. Only the part's own writer may call
    this, before it writes.
    """
    settle(folder, folder.listed(part))
    coverage, attempt = Coverage(), 0
    flushes: dict[tuple[int, int, int], list[File]] = {}
    for file in folder.files(part):
        flushes.setdefault((file.first, file.start, file.end), []).append(file)
    for files in flushes.values():
        abouts = []
        for file in files:
            try:
                abouts.append(read_about(folder, file))
            except TORN as error:  # a flush may be repeated; a merged file may not be, so its other tables are kept
                for torn in [file] if file.merged else files:
                    folder.put_aside(torn.path, error)
                if not file.merged:
                    abouts = []
                    break
        if not abouts:
            continue
        if not files[0].merged and {file.table for file in files} != set(abouts[0]["tables"]):
            for file in files:
                folder.remove(file.path)
            continue
        coverage.update(Coverage(abouts[0]["steps"]))
        attempt = max(attempt, abouts[0]["attempt"])
    return coverage, attempt
