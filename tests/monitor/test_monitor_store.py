"""The metrics plane as Parquet, read with DuckDB alone, which knows nothing of how it was written, and through
`store`."""

import json
from dataclasses import replace

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from steptron.monitor.sinks.plane import PlaneSink
from steptron.monitor.statistics.frame import Frame
from steptron.monitor.statistics.reduction import RULES
from steptron.monitor.statistics.registry import Registry
from steptron.monitor.storage import database, store
from steptron.monitor.storage.compact import recover
from steptron.monitor.storage.files import Folder
from steptron.monitor.storage.store import Store

from planes import steps_in

LAYERS, EXPERTS = [3, 4, 7], 6
CELLS = len(LAYERS) * EXPERTS


def make_registry(layers=LAYERS, world: int = 2) -> Registry:
    registry = Registry()
    registry.add("loss", unit="nats", reduction="sum", axes={}, vital=True)
    registry.add("step_time", unit="s", reduction="sum", axes={"rank": range(world)}, vital=True)
    by_expert = {"layer": layers, "expert": range(EXPERTS)}
    for name in ("rows", "square_sum"):
        registry.add(name, unit="1", reduction="sum", axes=by_expert, vital=True)
    registry.derive("rms", unit="1", powers={"square_sum": 0.5, "rows": -0.5})
    registry.add("peak", unit="1", reduction="max", axes=by_expert)
    registry.add("few", unit="1", reduction="max", axes={"layer": layers[:2], "expert": range(EXPERTS)})
    registry.add("norm", unit="1", reduction="sum", axes={"parameter": ["a.weight", "it's"]})
    return registry


def make_planes(registry: Registry, steps: range, seed: int = 0) -> dict[int, np.ndarray]:
    random = np.random.default_rng(seed)
    return {step: random.integers(1, 1 << 20, registry.slots).astype(np.float32) for step in steps}


def write(folder, registry, planes, part="rank-00000", flush_every=4, **options) -> None:
    written = Store(folder, part, registry, flush_every, **options)
    for step, plane in planes.items():
        written.add(step, plane)
    written.close()


def names(folder, table: str = "run") -> list[str]:
    return sorted(path.name for path in (folder / table).iterdir())


def test_every_value_is_found_by_step_layer_and_expert(tmp_path):
    registry = make_registry()
    planes = make_planes(registry, range(1, 11))
    write(tmp_path, registry, planes)
    query = f"SELECT step, layer, expert, rows, peak FROM '{tmp_path}/layer_expert/*.parquet' WHERE rows IS NOT NULL"
    rows = duckdb.sql(query).fetchall()
    assert len(rows) == 10 * CELLS
    for step, layer, expert, count, peak in rows:
        cell = (LAYERS.index(layer), expert)
        assert count == registry.view(planes[step], "rows")[cell]
        assert peak == registry.view(planes[step], "peak")[cell]
    found = duckdb.sql(f"SELECT norm FROM '{tmp_path}/parameter/*.parquet' WHERE step = 3 AND parameter = 'it''s'")
    assert found.fetchall() == [(planes[3][-1],)]


def test_a_file_every_few_steps_named_by_its_steps(tmp_path):
    registry = make_registry()
    write(tmp_path, registry, make_planes(registry, range(1, 11)))
    expected = [
        f"rank-00000-steps-{a:08d}-{b:08d}.{n}.parquet" for n, (a, b) in enumerate([(1, 4), (5, 8), (9, 10)], 1)
    ]
    assert names(tmp_path) == names(tmp_path, "layer_expert") == expected
    assert steps_in(tmp_path) == {step: frozenset([0]) for step in range(1, 11)}


def test_columns_say_their_unit_and_reduction(tmp_path):
    registry = make_registry()
    write(tmp_path, registry, make_planes(registry, range(1, 2)))
    schema = pq.read_schema(next((tmp_path / "layer_expert").iterdir()))
    assert schema.names == ["step", "layer", "expert", "rows", "square_sum", "peak", "few"]
    assert schema.field("peak").metadata == {b"unit": b"1", b"reduction": b"max"}


@pytest.mark.parametrize("url", ["", "memory://plane-{}/metrics"], ids=["local", "fsspec"])
def test_parts_are_put_together_by_reduction_and_derived_columns_made_of_the_result(tmp_path, url):
    folder = url.format(tmp_path.name) if url else tmp_path / "metrics"
    whole, shared = make_registry(), make_registry().own()
    mine, theirs = make_planes(whole, range(1, 7)), make_planes(shared, range(1, 7), seed=1)
    write(folder, whole, mine)
    write(folder, shared, theirs, part="rank-00001", flush_every=5)
    connection = store.connect(folder)
    rows = connection.execute("SELECT step, layer, expert, rows, peak, few, rms FROM layer_expert").fetchall()
    assert len(rows) == 6 * CELLS
    for step, layer, expert, count, peak, few, rms in rows:
        cell = (LAYERS.index(layer), expert)
        assert count == whole.view(mine[step], "rows")[cell]
        assert peak == max(whole.view(mine[step], "peak")[cell], shared.view(theirs[step], "peak")[cell])
        assert rms == pytest.approx(np.sqrt(whole.view(mine[step], "square_sum")[cell] / count), rel=1e-6)
        if layer == 7:
            assert few is None
        else:
            assert few == max(whole.view(mine[step], "few")[cell], shared.view(theirs[step], "few")[cell])
    sums = [
        float(a) + float(b) for a, b in zip(whole.view(mine[2], "norm"), shared.view(theirs[2], "norm"), strict=True)
    ]
    found = connection.execute("SELECT norm FROM parameter WHERE step = 2 ORDER BY parameter").fetchall()
    assert found == [(value,) for value in sums]
    again = list(database.vital_planes(folder, after=2))
    assert [step for step, _, _ in again] == [3, 4, 5, 6]
    for step, registry, plane in again:
        assert registry.identity == whole.identity
        np.testing.assert_array_equal(plane, mine[step][: whole.vital_slots])


def test_nothing_to_divide_by_is_null(tmp_path):
    registry = make_registry()
    plane = make_planes(registry, range(1, 2))[1]
    registry.view(plane, "rows")[1, 2] = 0
    write(tmp_path, registry, {1: plane})
    found = store.connect(tmp_path).execute("SELECT layer, expert FROM layer_expert WHERE rms IS NULL").fetchall()
    assert found == [(4, 2)]


def test_absent_values_are_null_and_cells_without_any_have_no_row(tmp_path):
    registry = make_registry()
    planes, absent = make_planes(registry, range(1, 3)), np.zeros(registry.slots, bool)
    for name in ("rows", "square_sum", "peak"):
        registry.view(absent, name)[2, 1:] = True
    registry.view(absent, "peak")[0] = True
    registry.view(absent, "norm")[0] = True
    written = Store(tmp_path, "server-00", registry, 10)
    written.add(1, planes[1], {0, 1}, absent)
    written.add(2, planes[2], {0, 1, 2})
    written.close()
    connection = store.connect(tmp_path)
    counts = "SELECT step, count(*), count(rows), count(peak), sum(rows) FROM layer_expert GROUP BY 1 ORDER BY 1"
    seen = registry.view(planes[1], "rows")
    assert connection.execute(counts).fetchall() == [
        (1, CELLS - 5, CELLS - 5, CELLS - 5 - EXPERTS, float(seen[:2].sum() + seen[2, 0])),
        (2, CELLS, CELLS, CELLS, float(registry.view(planes[2], "rows").sum())),
    ]
    assert connection.execute("SELECT parameter FROM parameter WHERE step = 1").fetchall() == [("it's",)]
    assert steps_in(tmp_path) == {1: frozenset([0, 1]), 2: frozenset([0, 1, 2])}


@pytest.mark.parametrize("keep", [0, 2, 4, 5, 9, 10, 12])
def test_truncation_drops_just_the_later_steps_of_all_tables(tmp_path, keep):
    registry = make_registry()
    planes = make_planes(registry, range(1, 11))
    write(tmp_path, registry, planes)
    (tmp_path / "run" / ".rank-00000-steps-00000011-00000014.parquet.0a1b2c3d.tmp").write_bytes(b"torn")
    sink = PlaneSink(tmp_path, registry, 4)
    sink.truncate_after(keep)
    sink.write(Frame(step=keep + 1, metrics={}, tokens_by_source={}, plane=planes[1]))
    sink.close()
    connection = store.connect(tmp_path)
    expected = {step: planes[step] for step in range(1, min(keep, 10) + 1)} | {keep + 1: planes[1]}
    for table, name in (("layer_expert", "rows"), ("parameter", "norm")):
        rows = connection.execute(f"SELECT step, sum({name}) FROM {table} GROUP BY step ORDER BY step").fetchall()
        sums = [(step, float(registry.view(plane, name).sum(dtype=np.float64))) for step, plane in expected.items()]
        assert rows == sums
    assert list(steps_in(tmp_path)) == list(expected)
    assert not list(tmp_path.glob("*/*.tmp"))


def test_a_new_run_does_not_add_to_another_ones_plane(tmp_path):
    registry = make_registry()
    planes = make_planes(registry, range(1, 5))
    write(tmp_path, registry, planes)
    frame = Frame(step=1, metrics={}, tokens_by_source={}, plane=planes[1])
    with pytest.raises(OSError, match="another run's metrics"):
        PlaneSink(tmp_path, registry, 1).write(frame)
    assert list(steps_in(tmp_path)) == [1, 2, 3, 4]
    resumed = PlaneSink(tmp_path, registry, 1)
    resumed.truncate_after(0)
    resumed.write(frame)
    assert list(steps_in(tmp_path)) == [1]


def test_a_resume_on_fewer_ranks_drops_the_later_steps_of_ranks_that_are_no_more(tmp_path):
    registry = make_registry()
    for rank in range(5):
        write(tmp_path, registry, make_planes(registry, range(1, 9)), part=f"rank-{rank:05d}")
    write(tmp_path, registry, make_planes(registry, range(1, 9)), part="server-00")
    sinks = [PlaneSink(tmp_path, registry, 4, rank, 2) for rank in range(2)]
    sinks[1].truncate_after(6)
    assert {file.last for file in Folder.at(tmp_path).files("rank-0000[13]")} == {4, 6}
    assert {file.last for file in Folder.at(tmp_path).files("rank-0000[024]")} == {4, 8}
    sinks[0].truncate_after(6)
    assert {file.last for file in Folder.at(tmp_path).files()} == {4, 6}


def test_a_registry_that_changed_at_a_resume_is_a_new_file_that_names_the_old_one(tmp_path):
    old, new = make_registry(world=2), make_registry(world=3)
    before, after = make_planes(old, range(1, 7)), make_planes(new, range(5, 9), seed=3)
    write(tmp_path, old, before)
    for registry in (old, new):  # the first resume changes nothing, the second does
        sink = PlaneSink(tmp_path, registry, 2)
        sink.truncate_after(4)
        for step, plane in (before if registry is old else after).items():
            if step > 4:
                sink.write(Frame(step=step, metrics={}, tokens_by_source={}, plane=plane))
        sink.close()
    assert names(tmp_path, "registry") == ["rank-00000-00000001.json", "rank-00000-00000005.json"]
    files = [json.loads((tmp_path / "registry" / name).read_text()) for name in names(tmp_path, "registry")]
    assert [file["follows"] for file in files] == [None, "rank-00000-00000001.json"]
    assert [registry.identity for registry in store.registries(tmp_path)] == [old.identity, new.identity]
    found = list(database.vital_planes(tmp_path))
    assert [step for step, _, _ in found] == list(range(1, 9))
    for step, registry, plane in found:
        source = before if step <= 4 else after
        np.testing.assert_array_equal(plane, source[step][: registry.vital_slots])
    PlaneSink(tmp_path, old, 2).truncate_after(2)
    assert names(tmp_path, "registry") == ["rank-00000-00000001.json"]


def test_a_torn_registry_is_passed_over(tmp_path):
    registry = make_registry()
    write(tmp_path, registry, make_planes(registry, range(1, 3)))
    (tmp_path / "registry" / "rank-00001-00000001.json").write_text('{"version": 2, "sta')
    assert [one.identity for one in store.registries(tmp_path)] == [registry.identity]


def test_recover_knows_what_is_there_and_removes_a_flush_that_was_cut_short(tmp_path):
    registry = make_registry()
    write(tmp_path, registry, make_planes(registry, range(1, 11)), part="server-00", attempt=77)
    (tmp_path / "parameter" / "server-00-steps-00000009-00000010.3.parquet").unlink()
    coverage, attempt = recover(Folder.at(tmp_path), "server-00")
    assert attempt == 77
    assert dict(coverage) == {step: frozenset([0]) for step in range(1, 9)}
    assert {file.last for file in Folder.at(tmp_path).files()} == {4, 8}


def test_a_step_that_comes_twice_is_a_file_of_its_own(tmp_path):
    registry = make_registry()
    planes = make_planes(registry, range(5, 6))
    for _ in range(3):
        write(tmp_path, registry, planes, part="server-00")
    found = store.connect(tmp_path).execute("SELECT loss FROM run").fetchall()
    assert found == [(3.0 * planes[5][0],)]


def test_a_full_disk_raises_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    registry = make_registry()
    written = Store(tmp_path, "rank-00000", registry, 100)
    for step, plane in make_planes(registry, range(1, 5)).items():
        written.add(step, plane)
    real, left = pq.ParquetWriter.write_table, [3]

    def refuse(self, table, **options):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(self, table, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", refuse)
    with pytest.raises(OSError, match="No space left"):
        written.flush()
    monkeypatch.undo()
    assert not list(tmp_path.glob("*/*.parquet*"))
    written.add(5, make_planes(registry, range(5, 6))[5])
    written.flush()
    assert list(steps_in(tmp_path)) == [5]


def test_a_view_of_a_locked_connection_opens_no_other_file(tmp_path, monkeypatch):
    """Even were a registry's text to become SQL: the lock is there before the views."""
    registry = make_registry()
    write(tmp_path / "metrics", registry, make_planes(registry, range(1, 3)))
    (tmp_path / "secret.csv").write_text("a\n1\n")
    assert store.connect(tmp_path / "metrics", locked=True).execute("SELECT count(*) FROM run").fetchone() == (2,)
    reading = f"(SELECT count(*) FROM read_csv('{tmp_path}/secret.csv')) + sum({{0}})"
    monkeypatch.setitem(RULES, "sum", replace(RULES["sum"], sql=reading))  # pyright: ignore[reportArgumentType]
    assert store.connect(tmp_path / "metrics").execute("SELECT count(*) FROM run").fetchone() == (2,)
    with pytest.raises(duckdb.PermissionException):
        store.connect(tmp_path / "metrics", locked=True).execute("SELECT count(*) FROM run")
