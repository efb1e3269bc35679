"""Merging of the plane's files: the same rows before, at each point within, and after, also where the writer is killed
there."""

import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from steptron.monitor.dashboard import plane_reader
from steptron.monitor.dashboard.plane_reader import PlaneReader
from steptron.monitor.sinks.plane import PlaneSink
from steptron.monitor.statistics.frame import Frame
from steptron.monitor.statistics.registry import Registry
from steptron.monitor.storage import compact, store
from steptron.monitor.storage.compact import recover, settle
from steptron.monitor.storage.files import File, Folder, live
from steptron.monitor.storage.store import Store
from test_monitor_store import make_planes, make_registry, names, write

from plane_server import assert_stored, frame, free_port, make_sink, running
from planes import steps_in
from waiting import wait_until

PART = "rank-00000"


def small_registry() -> Registry:
    registry = Registry()
    registry.add("loss", unit="nats", reduction="sum", axes={}, vital=True)
    registry.add("norm", unit="1", reduction="sum", axes={"parameter": ["a.weight", "it's"]})
    return registry


REGISTRY = small_registry()
PLANES = make_planes(REGISTRY, range(1, 400))


def rows(folder) -> dict[str, list]:
    """Every row of every table, as SQL gives them."""
    with store.connect(folder) as database:
        return {
            name: database.execute(f"SELECT * FROM {name} ORDER BY ALL").fetchall() for name in ("parameter", "run")
        }


def stored(folder) -> dict[str, list]:
    """The same without SQL: what the files that count have, as Parquet's own reader gives it."""
    found: dict[str, list] = {"parameter": [], "run": []}
    for file in Folder.at(folder).files():
        found[file.table] += map(tuple, map(dict.values, pq.read_table(file.path).to_pylist()))
    return {table: sorted(values) for table, values in found.items()}


def written(steps) -> dict[str, list]:
    """What is to be there of these steps, straight from the planes."""
    names = ("a.weight", "it's")
    cells = [(step, name, float(PLANES[step][1 + n])) for step in steps for n, name in enumerate(names)]
    return {"parameter": cells, "run": [(step, float(PLANES[step][0])) for step in steps]}


def flushes(folder, steps, part: str = PART) -> None:
    """Flush a step at a time, as a writer does that merges nothing."""
    of_part = Store(folder, part, REGISTRY, 1)
    of_part._compactor.add = lambda files: None
    for step in steps:
        of_part.add(step, PLANES[step])


def merge_all(folder, part: str = PART) -> list[File]:
    """Do all merges that are due, and return the inputs, which stay."""
    place, retired = Folder.at(folder), []
    files = place.files(part)
    while due := compact.due(files, lambda file: place.fs.size(file.path)):
        compact.merge(place, due)
        retired += due
        files = place.files(part)
    return retired


def count(folder, table: str = "run") -> int:
    return len(Folder.at(folder).listed(table=table))


def at(start: int, end: int, first: int = 1, last: int = 9, table: str = "run") -> File:
    return File(f"{table}/{first}-{last}.{start}-{end}", table, PART, first, last, start, end)


def test_a_file_counts_unless_another_one_has_its_flushes():
    files = [at(1, 8), at(1, 1), at(8, 8), at(9, 9), at(1, 1, table="rank"), at(9, 9, first=10, last=20)]
    assert set(live(files)) == {at(1, 8), at(9, 9), at(1, 1, table="rank"), at(9, 9, first=10, last=20)}
    assert live([at(1, 64), at(1, 8), at(2, 2), at(57, 64)]) == [at(1, 64)]
    assert live([at(3, 3, last=9), at(3, 3, last=5)]) == [at(3, 3, last=5)], "one that was cut is the newer one"
    old = [at(0, 0, first=1), at(0, 0, first=5)]
    assert live([*old, at(1, 8, first=20)]) == [*old, at(1, 8, first=20)], "files of earlier versions have no numbers"


@pytest.mark.parametrize("flushed", [7, 8, 63, 64, 200, 1000])
def test_files_are_bounded_by_levels_of_eight(flushed):
    files: list[File] = []
    for number in range(1, flushed + 1):
        files.append(at(number, number, number, number))
        while due := compact.due(files, lambda file: 1):
            assert len(due) == 8
            merged = at(due[0].start, due[-1].end, due[0].first, due[-1].last)
            files = [*(file for file in files if file not in due), merged]
    digits = [int(digit) for digit in np.base_repr(flushed, 8)]
    assert len(files) == sum(digits) <= 7 * len(digits)
    numbers = sorted(number for file in files for number in range(file.start, file.end + 1))
    assert numbers == list(range(1, flushed + 1)), "each flush once"


def test_large_flushes_are_not_merged_beyond_the_limit():
    def merged(sizes: list[int]) -> list[int]:
        files = [at(number, number, number, number) for number in range(1, len(sizes) + 1)]
        size = {file: mib << 20 for file, mib in zip(files, sizes, strict=True)}
        while due := compact.due(files, size.__getitem__):
            new = at(due[0].start, due[-1].end, due[0].first, due[-1].last)
            size[new] = sum(size[file] for file in due)
            files = [*(file for file in files if file not in due), new]
        return [size[file] >> 20 for file in sorted(files, key=lambda file: file.start)]

    assert merged([300] * 20) == [300] * 20
    assert merged([100] * 20) == [*[200] * 9, 100, 100]
    assert merged([30] * 8) == [240]
    assert max(merged([20] * 100)) <= 256
    assert len(merged([20] * 100)) <= 100 * 20 / 200 + 7


class Points:
    """Calls a function before each operation on files that a writer does, and after the last."""

    def __init__(self, monkeypatch, folder: Folder, look):
        self.count, self._busy = 0, False

        def watched(real):
            def act(*arguments, **options):
                self._point(look)
                return real(*arguments, **options)

            return act

        if folder.local:
            for owner, name in ((Path, "replace"), (os, "fsync"), (os, "unlink"), (os, "remove")):
                monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
            monkeypatch.setattr(pq.ParquetWriter, "close", watched(pq.ParquetWriter.close))
        else:
            for name in ("pipe_file", "rm_file"):
                monkeypatch.setattr(type(folder.fs), name, watched(getattr(type(folder.fs), name)))

    def _point(self, look) -> None:
        if not self._busy:
            self._busy = True
            try:
                look()
            finally:
                self._busy = False
            self.count += 1


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return tmp_path / "metrics" if request.param == "local" else f"memory://compact-{tmp_path.name}/metrics"


@pytest.fixture
def threes(monkeypatch):
    """Three files make one: levels are reached soon."""
    monkeypatch.setattr(compact, "FANOUT", 3)


@pytest.mark.usefixtures("threes")
def test_a_reader_finds_each_row_once_at_every_point_of_merges_and_removals(folder, monkeypatch):
    place, seen = Folder.at(folder), 0
    flushes(folder, range(1, 3))
    with store.connect(folder) as kept_open:
        for step in range(3, 10):
            flushes(folder, [step])
            expected = written(range(1, step + 1))

            def look(step: int = step, expected: dict = expected) -> None:
                assert rows(folder) == expected
                assert kept_open.execute("SELECT count(*) FROM run").fetchall() == [(step,)]

            with monkeypatch.context() as patched:
                points = Points(patched, place, look)
                merge_all(folder)
                settle(place, place.listed())
                look()
                seen += points.count
    assert seen > 30
    assert [(file.start, file.end) for file in place.listed(table="run")] == [(1, 9)]


def copies_at_every_point(folder: Path, monkeypatch, act) -> list[Path]:
    """The folder as a kill at each point of `act` leaves it."""
    copies: list[Path] = []

    def copy() -> None:
        copies.append(folder.with_name(f"{folder.name}-{len(copies)}"))
        shutil.copytree(folder, copies[-1])

    with monkeypatch.context() as patched:
        Points(patched, Folder.at(folder), copy)
        act()
    return copies


@pytest.mark.usefixtures("threes")
def test_a_writer_that_is_killed_at_any_point_leaves_the_same_rows_and_the_next_one_goes_on(tmp_path, monkeypatch):
    folder = tmp_path / "metrics"
    place = Folder.at(folder)
    flushes(folder, range(1, 4))
    merge_all(folder)
    flushes(folder, range(4, 7))
    merge_all(folder)
    flushes(folder, range(7, 11))

    def merge_and_remove() -> None:
        merge_all(folder)
        settle(place, place.listed())

    expected = written(range(1, 11))
    killed = copies_at_every_point(folder, monkeypatch, merge_and_remove)
    assert len(killed) > 25
    for number, copied in enumerate(killed):
        assert stored(copied) == expected
        if number % 2:
            assert dict(recover(Folder.at(copied), PART)[0]) == {step: frozenset([0]) for step in range(1, 11)}
            assert stored(copied) == expected
        sink = PlaneSink(copied, REGISTRY, 1)
        sink.truncate_after(10)
        for step in range(11, 13):
            sink.write(Frame(step=step, metrics={}, tokens_by_source={}, plane=PLANES[step]))
        sink.close()
        assert stored(copied) == written(range(1, 13))
        assert not list(copied.glob("*/*.tmp"))
        assert count(copied) <= 4
        assert Folder.at(copied).listed() == Folder.at(copied).files()
    assert rows(killed[-1]) == written(range(1, 13))


def test_a_process_that_is_killed_while_it_writes_and_merges_has_each_flush_once(tmp_path):
    context = get_context("fork")
    for seed in range(5):
        folder = tmp_path / str(seed)
        child = context.Process(target=_write_for_ever, args=(folder,))
        child.start()
        while count(folder) < 3:
            time.sleep(0.005)
        time.sleep(0.07 * seed)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        coverage, _ = recover(Folder.at(folder), PART)
        steps = list(dict(coverage))
        assert steps == list(range(1, len(steps) + 1))
        assert stored(folder) == written(steps)


def _write_for_ever(folder: Path) -> None:
    part = Store(folder, PART, REGISTRY, 1)
    for step, plane in PLANES.items():
        part.add(step, plane)
    time.sleep(60)


@pytest.mark.parametrize("keep", [0, 3, 10, 19, 20])
def test_a_rewind_cuts_rows_that_were_merged_with_living_ones(folder, keep):
    flushes(folder, range(1, 18))
    merge_all(folder)
    flushes(folder, range(18, 21))
    sink = PlaneSink(folder, REGISTRY, 1)
    sink.truncate_after(keep)
    if keep:
        assert rows(folder) == written(range(1, keep + 1))
    assert list(steps_in(folder)) == list(range(1, keep + 1))
    undone = {step: plane + 1 for step, plane in PLANES.items() if keep < step <= 30}
    for step, plane in undone.items():
        sink.write(Frame(step=step, metrics={}, tokens_by_source={}, plane=plane))
    sink.close()
    found = store.connect(folder).execute("SELECT step, loss FROM run ORDER BY step").fetchall()
    assert found == [(step, (undone if step > keep else PLANES)[step][0]) for step in range(1, 31)]
    assert list(steps_in(folder)) == list(range(1, 31))


def test_a_cut_that_is_killed_at_any_point_has_no_row_twice_and_can_be_done_again(tmp_path, monkeypatch):
    folder = tmp_path / "metrics"
    flushes(folder, range(1, 10))
    merge_all(folder)
    flushes(folder, range(10, 12))
    for copied in copies_at_every_point(
        folder, monkeypatch, lambda: compact.truncate(Folder.at(folder), 6, lambda part: True)
    ):
        for table, found in stored(copied).items():
            assert found == written(range(1, 7))[table] or len(set(found)) == len(found) > len(
                written(range(1, 7))[table]
            )
        compact.truncate(Folder.at(copied), 6, lambda part: True)
        assert stored(copied) == written(range(1, 7))
    assert rows(folder) == written(range(1, 7))


def test_flushes_with_other_columns_are_merged_as_sql_puts_them_together(tmp_path):
    """Ranks that sent late have registries of their own; their flushes lie between the others."""
    whole, late = make_registry(), Registry()
    late.add("rows", unit="1", reduction="sum", axes={"layer": [3], "expert": range(6)})
    part = Store(tmp_path, "server-00", whole, 1)
    part._compactor.add = lambda files: None
    for step, plane in make_planes(whole, range(1, 25)).items():
        part.lay_out(whole if step % 2 else late, late=step % 2 == 0)
        part.add(step, plane if step % 2 else np.full(6, step, np.float32))

    def rows(folder) -> list:
        with store.connect(folder) as database:
            tables = ("layer_expert", "parameter", "rank", "run")
            return [database.execute(f"SELECT * FROM {name} ORDER BY ALL").fetchall() for name in tables]

    before = rows(tmp_path)
    merge_all(tmp_path, "server-00")
    settle(Folder.at(tmp_path), Folder.at(tmp_path).listed())
    assert rows(tmp_path) == before
    assert (count(tmp_path, "layer_expert"), count(tmp_path, "parameter")) == (1, 1)
    coverage, _ = recover(Folder.at(tmp_path), "server-00")
    assert list(dict(coverage)) == list(range(1, 25))


def test_the_writer_merges_by_itself_beside_readers_that_see_no_row_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(compact, "GRACE_S", 0.01)
    folder = tmp_path / "metrics"
    part = Store(folder, PART, REGISTRY, 1)
    part.add(1, PLANES[1])
    wrong: list = []
    done = threading.Event()

    @contextmanager
    def reading(look):
        def again() -> None:
            while not done.is_set():
                try:
                    look()
                except Exception as error:
                    wrong.append(error)
                    return

        thread = threading.Thread(target=again)
        thread.start()
        yield
        thread.join()

    database, page = store.connect(folder), PlaneReader(str(folder))

    def by_sql() -> None:
        found = database.execute("SELECT step, loss FROM run ORDER BY step").fetchall()
        if found != [(step, PLANES[step][0]) for step in range(1, len(found) + 1)]:
            wrong.append(found)

    with reading(by_sql), reading(lambda: page.poll([1])), reading(lambda: steps_in(folder)):
        for step in range(2, 301):
            part.add(step, PLANES[step])
            time.sleep(0.002)
        part.close()
        done.set()
    assert not wrong
    by_sql()
    assert count(folder) <= 7 * 3
    assert Folder.at(folder).listed() == Folder.at(folder).files()


def test_a_full_disk_ends_a_merge_and_nothing_else(tmp_path, monkeypatch, caplog):
    registry = make_registry()
    real = pq.ParquetWriter.write_table

    def refuse(self, table, **options):
        if len(table) > 20 * 18:  # what is merged
            raise OSError(28, "No space left on device")
        real(self, table, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", refuse)
    write(tmp_path, registry, make_planes(registry, range(1, 81)), flush_every=4)
    assert [record.message for record in caplog.records if "cannot be merged" in record.message]
    assert len(names(tmp_path)) == 20
    monkeypatch.undo()
    assert not list(tmp_path.glob("*/*.tmp"))
    assert list(steps_in(tmp_path)) == list(range(1, 81))
    sink = PlaneSink(tmp_path, registry, 4)
    sink.truncate_after(80)
    for step, plane in make_planes(registry, range(81, 85)).items():
        sink.write(Frame(step=step, metrics={}, tokens_by_source={}, plane=plane))
    sink.close()
    assert len(names(tmp_path)) == 1
    assert list(steps_in(tmp_path)) == list(range(1, 85))


def test_a_torn_merged_file_costs_its_own_table_alone(tmp_path):
    flushes(tmp_path, range(1, 17))
    merge_all(tmp_path)
    settle(Folder.at(tmp_path), Folder.at(tmp_path).listed())
    (torn,) = Folder.at(tmp_path).files(table="parameter")
    Path(torn.path).write_bytes(b"")
    coverage, _ = recover(Folder.at(tmp_path), PART)
    assert list(dict(coverage)) == list(range(1, 17))
    assert (count(tmp_path, "run"), count(tmp_path, "parameter")) == (1, 0)


def test_a_server_merges_what_it_writes_also_after_a_kill_and_in_another_attempt(tmp_path):
    port, folder = free_port(), tmp_path / "runs" / "night" / "metrics"
    with running(tmp_path / "runs", "--flush-every", "1", port=port) as server:
        sinks = [make_sink(server.address, tmp_path / "night", rank) for rank in range(2)]
        for step in range(1, 31):
            for rank, sink in enumerate(sinks):
                sink.write(frame(rank, step))
        wait_until(lambda: len(steps_in(folder)) > 20, "step 20 in the store")
        server.kill()
    with running(tmp_path / "runs", "--flush-every", "1", port=port) as server:
        for sink in sinks:
            sink.close()
        assert_stored(folder, range(1, 31), range(2))
        for rank in range(2):
            sink = make_sink(server.address, tmp_path / "night", rank, attempt=2, resumed=20)
            for step in range(21, 41):
                sink.write(frame(rank, step))
            sinks[rank] = sink
        for sink in sinks:
            sink.close()
        assert_stored(folder, range(1, 41), range(2))
        server.stop()
    assert_stored(folder, range(1, 41), range(2))
    assert Folder.at(folder).listed() == Folder.at(folder).files()
    assert count(folder) <= 14


def test_the_page_reads_nothing_anew_for_a_merge(tmp_path, monkeypatch):
    monkeypatch.setattr(plane_reader, "WINDOW_STEPS", 8)
    monkeypatch.setattr(plane_reader, "WINDOW_ROWS", 1)
    flushes(tmp_path, range(1, 101))
    page = PlaneReader(str(tmp_path))
    assert not page.poll([1])
    before = {
        name: [span.values["sum"][1].tolist() for _, span in view.spans()[0].in_order()]
        for name, view in page.views.items()
    }
    merge_all(tmp_path)
    settle(Folder.at(tmp_path), Folder.at(tmp_path).listed())
    read = []
    real = plane_reader._dense
    monkeypatch.setattr(plane_reader, "_dense", lambda *args: (read.append(args[1]), real(*args))[1])
    assert not page.poll([1])
    assert page.generation == 1
    assert set(read) == {(88, 95), (96, 103)}, "the windows that may still grow"
    after = {
        name: [span.values["sum"][1].tolist() for _, span in view.spans()[0].in_order()]
        for name, view in page.views.items()
    }
    assert before == after
    assert all(before.values())


def _by_sql(folder) -> list[int]:
    return [step for (step,) in store.connect(folder).execute("SELECT step FROM run ORDER BY step").fetchall()]


def _by_page(folder) -> list[int]:
    page = PlaneReader(str(folder))
    page.poll([1])
    spans = page.views["parameter"].spans()[0].in_order()
    return [step for _, span in spans for step in range(span.first, span.last + 1)]


def _by_coverage(folder) -> list[int]:
    return list(steps_in(folder))


@pytest.mark.parametrize("read", [_by_sql, _by_page, _by_coverage], ids=["SQL", "the page", "coverage"])
def test_a_reader_whose_files_are_merged_away_after_it_has_listed_them_begins_again(folder, monkeypatch, read):
    flushes(folder, range(1, 18))
    real, listed = Folder.files, []

    def files(self, part="*", table="*"):
        found = real(self, part, table)
        if not listed:
            listed.append(found)
            merge_all(folder)
            settle(self, self.listed())
        return found

    monkeypatch.setattr(Folder, "files", files)
    assert read(folder) == list(range(1, 18))
    assert len(listed[0]) == 34
    assert count(folder) == 1
