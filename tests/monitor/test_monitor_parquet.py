"""The metrics plane as Parquet, read with DuckDB, which knows nothing of how it was written."""

from pathlib import Path

import duckdb
import numpy as np
import pytest

from steptron.monitor.frame import Frame
from steptron.monitor.registry import Registry
from steptron.monitor.sinks.parquet import ParquetSink

LAYERS, EXPERTS = [3, 4, 7], 6


def _registry() -> Registry:
    registry = Registry()
    registry.add("tokens", unit="tokens", reduction="sum", axes={"layer": LAYERS, "expert": range(EXPERTS)})
    return registry


def _write(folder: Path, registry: Registry, steps: range, flush_every: int = 4) -> np.ndarray:
    random = np.random.default_rng(0)
    planes = random.integers(0, 1 << 24, (steps.stop, registry.slots)).astype(np.float32)
    sink = ParquetSink(folder, registry, flush_every)
    for step in steps:
        sink.write(Frame(step=step, metrics={}, tokens_by_source={}, plane=planes[step]))
    sink.close()
    return planes


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "metrics").glob("*.parquet*"))


def _query(folder: Path, sql: str) -> list[tuple]:
    return duckdb.sql(sql.replace("PLANE", f"'{folder}/metrics/*.parquet'")).fetchall()


def test_every_value_is_found_by_step_layer_and_expert(tmp_path):
    planes = _write(tmp_path, _registry(), range(1, 11))
    rows = _query(tmp_path, "SELECT step, layer, expert, tokens FROM PLANE")
    assert len(rows) == 10 * len(LAYERS) * EXPERTS
    for step, layer, expert, tokens in rows:
        assert tokens == planes[step, LAYERS.index(layer) * EXPERTS + expert]


def test_a_file_every_few_steps_named_by_its_steps(tmp_path):
    _write(tmp_path, _registry(), range(1, 11))
    assert _names(tmp_path) == [f"steps-{a:08d}-{b:08d}.parquet" for a, b in ((1, 4), (5, 8), (9, 10))]


def test_flush_writes_what_is_there_at_once(tmp_path):
    sink = ParquetSink(tmp_path, _registry(), 50)
    sink.write(Frame(step=9, metrics={}, tokens_by_source={}, plane=np.zeros(18, np.float32)))
    assert _names(tmp_path) == []
    sink.flush()
    sink.flush()
    assert _names(tmp_path) == ["steps-00000009-00000009.parquet"]


@pytest.mark.parametrize("keep", [0, 2, 4, 5, 9, 10, 12])
def test_truncation_drops_just_the_later_steps(tmp_path, keep):
    planes = _write(tmp_path, _registry(), range(1, 11))
    (tmp_path / "metrics" / "steps-00000011-00000014.parquet.tmp").write_bytes(b"torn")
    sink = ParquetSink(tmp_path, _registry(), 4)
    sink.truncate_after(keep)
    sink.write(Frame(step=keep + 1, metrics={}, tokens_by_source={}, plane=planes[1]))
    sink.close()
    rows = _query(tmp_path, "SELECT step, count(*), sum(tokens) FROM PLANE GROUP BY step ORDER BY step")
    expected = [(step, 18, float(planes[step].sum(dtype=np.float64))) for step in range(1, min(keep, 10) + 1)]
    assert rows == [*expected, (keep + 1, 18, float(planes[1].sum(dtype=np.float64)))]
    assert not any(name.endswith(".tmp") for name in _names(tmp_path))


def test_other_grids_are_more_rows_of_the_same_table(tmp_path):
    registry = _registry()
    registry.add("norm", unit="1", reduction="max", axes={"layer": LAYERS, "expert": range(EXPERTS)})
    registry.add("weight_rms", unit="1", reduction="max", axes={"parameter": ["a.weight", "b.weight"]})
    planes = _write(tmp_path, registry, range(1, 4))
    assert _query(tmp_path, "SELECT count(*) FROM PLANE WHERE expert IS NOT NULL") == [(3 * 18,)]
    found = _query(tmp_path, "SELECT tokens, norm FROM PLANE WHERE step = 2 AND layer = 7 AND expert = 1")
    assert found == [(planes[2, 13], planes[2, 18 + 13])]
    found = _query(tmp_path, "SELECT layer, weight_rms FROM PLANE WHERE step = 3 AND parameter = 'b.weight'")
    assert found == [(None, planes[3, 37])]


def test_columns_say_their_unit(tmp_path):
    _write(tmp_path, _registry(), range(1, 2))
    import pyarrow.parquet as pq

    schema = pq.read_schema(tmp_path / "metrics" / "steps-00000001-00000001.parquet")
    assert schema.names == ["step", "layer", "expert", "tokens"]
    assert schema.field("tokens").metadata == {b"unit": b"tokens", b"reduction": b"sum"}
