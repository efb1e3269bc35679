"""Expert loads for the page: recorded by the collector, read back, decoded as the page's script does."""

import base64

import numpy as np
import pytest
from fake_run import make_recipe, make_steps

from steptron.monitor import heatmap
from steptron.monitor.collector import Collector

LAYERS = [2, 3, 5, 6, 7, 8, 9, 10]


def _decode(text: str) -> np.ndarray:
    codes = np.frombuffer(base64.b64decode(text), "<u2").astype(np.float64)
    return np.where(codes == 0, 0.0, 2 ** ((codes - 1) / 65534 * 24 - 12))


def _record(run_dir, count: int = 40):
    recipe = make_recipe(run_dir, count, flush_every=7)
    rows = list(make_steps(recipe))
    with Collector(recipe, run_dir, LAYERS, 16) as collector:
        for row in rows:
            collector.step(*row)
    return [row[0]["step"] for row in rows], [row[0]["stage"] for row in rows], np.stack([row[1] for row in rows])


@pytest.mark.parametrize("slices", [120, 7, 1], ids=["a slice a step", "several steps a slice", "a slice a stage"])
def test_loads_relative_to_the_mean_of_layer_and_slice(tmp_path, monkeypatch, slices):
    steps, stages, counts_SLE = _record(tmp_path)
    monkeypatch.setattr(heatmap, "MAX_SLICES", slices)
    found = heatmap.read(tmp_path, steps, stages)
    assert found is not None
    assert (found["layers"], found["experts"]) == (LAYERS, 16)
    load = _decode(found["load"]).reshape(len(found["slices"]), len(LAYERS), 16)
    for (first, last, stage), load_LE in zip(found["slices"], load, strict=True):
        assert {stages[step - 1] for step in range(first, last + 1)} == {stage}
        sums_LE = counts_SLE[first - 1 : last].sum(axis=0)
        expected_LE = sums_LE / sums_LE.mean(axis=1, keepdims=True)
        np.testing.assert_allclose(load_LE, expected_LE, rtol=2e-4)
        np.testing.assert_array_equal(load_LE == 0, sums_LE == 0)
    assert (found["slices"][0][0], found["slices"][-1][1]) == (1, 40)


def test_a_long_run_is_sampled_by_whole_files(tmp_path, monkeypatch):
    steps, stages, _ = _record(tmp_path)
    files = sorted((tmp_path / "metrics").glob("*.parquet"))
    monkeypatch.setattr(heatmap, "MAX_VALUES_READ", 15 * len(LAYERS) * 16)
    read = []
    real = heatmap.pq.read_table
    monkeypatch.setattr(heatmap.pq, "read_table", lambda file, **options: (read.append(file), real(file, **options))[1])
    assert heatmap.read(tmp_path, steps, stages) is not None
    assert read == files[::3]


def test_a_file_that_cannot_be_read_is_left_out(tmp_path):
    steps, stages, _ = _record(tmp_path)
    first = min((tmp_path / "metrics").glob("*.parquet"))
    first.write_bytes(first.read_bytes()[:100])
    found = heatmap.read(tmp_path, steps, stages)
    assert found is not None
    assert found["slices"][0][0] == 8


def test_no_experts_no_map(tmp_path):
    assert heatmap.read(tmp_path, [1, 2], ["base", "base"]) is None


def test_codes_keep_idle_apart_from_nearly_idle():
    tokens_SLE = np.array([[[0.0, 1e-9, 1.0, 3.0]]])
    assert _decode(heatmap.encode(tokens_SLE))[0] == 0
    assert _decode(heatmap.encode(tokens_SLE))[1] == pytest.approx(2**-12)
    np.testing.assert_allclose(_decode(heatmap.encode(tokens_SLE))[2:], [1, 3], rtol=2e-4)
