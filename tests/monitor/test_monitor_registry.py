"""Slots of the metrics plane."""

import json

import numpy as np

from steptron.monitor.registry import Registry


def _registry() -> Registry:
    registry = Registry()
    registry.add("tokens", unit="tokens", reduction="sum", axes={"layer": [3, 4], "expert": range(5)})
    registry.add("gate_mean", unit="1", reduction="sum", axes={"layer": [3, 4], "head": range(3)})
    registry.add("weight_rms", unit="1", reduction="max", axes={"parameter": ["a.weight", "b.weight"]})
    return registry


def test_statistics_share_the_plane_without_gap_or_overlap():
    registry = _registry()
    plane = registry.new_plane()
    assert plane.dtype == np.float32
    for number, name in enumerate(registry.statistics):
        view = registry.view(plane, name)
        assert np.isnan(view).all(), f"{name} overlaps an earlier one"
        view[...] = number
    assert plane.tolist() == [0] * 10 + [1] * 6 + [2] * 2


def test_a_slot_is_found_by_the_rule_that_the_file_states(tmp_path):
    registry = _registry()
    registry.write(tmp_path)
    written = json.loads((tmp_path / "metrics" / "registry.json").read_text())
    assert written["version"] == 1
    assert written["slots"] == 18
    plane = np.arange(18, dtype=np.float32)
    tokens = written["statistics"][0]
    for slot in range(tokens["first"], tokens["first"] + tokens["count"]):
        layer, expert = divmod(slot - tokens["first"], len(tokens["axes"]["expert"]))
        assert registry.view(plane, "tokens")[layer, expert] == slot
        assert tokens["axes"]["layer"][layer] in (3, 4)
    assert (tokens["unit"], tokens["reduction"]) == ("tokens", "sum")


def test_the_file_reads_back_as_the_same_registry(tmp_path):
    registry = _registry()
    registry.write(tmp_path)
    read = Registry.read(tmp_path)
    assert read is not None
    assert read.statistics == registry.statistics


def test_a_missing_or_torn_file_is_no_registry(tmp_path):
    assert Registry.read(tmp_path) is None
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "registry.json").write_text('{"version": 1, "sta')
    assert Registry.read(tmp_path) is None
