"""Slots of the metrics plane."""

import json

import numpy as np
import pytest
from steptron.monitor.statistics.reduced_stats import register_vitals
from steptron.monitor.statistics.registry import Registry, table_name


def _registry() -> Registry:
    registry = Registry()
    registry.add("rows", unit="tokens", reduction="sum", axes={"layer": [3, 4], "expert": range(5)}, vital=True)
    registry.add("square_sum", unit="1", reduction="sum", axes={"layer": [3, 4], "expert": range(5)}, vital=True)
    registry.derive("rms", unit="1", powers={"square_sum": 0.5, "rows": -0.5})
    registry.add("gate_sum", unit="1", reduction="sum", axes={"layer": [3, 4], "head": range(3)})
    registry.add("weight_max", unit="1", reduction="max", axes={"parameter": ["a.weight", "b.weight"]})
    registry.derive("squared", unit="1", powers={"weight_max": 2})
    return registry


def test_statistics_share_the_plane_without_gap_or_overlap():
    registry = _registry()
    plane = registry.new_plane()
    assert plane.dtype == np.float32
    for number, name in enumerate(registry.statistics):
        view = registry.view(plane, name)
        assert np.isnan(view).all(), f"{name} overlaps an earlier one"
        view[...] = number
    assert plane.tolist() == [0] * 10 + [1] * 10 + [2] * 6 + [3] * 2
    assert registry.vital_slots == 20


def test_tables_are_named_by_their_axes():
    assert [table_name(grid) for grid in _registry().grids()] == ["layer_expert", "layer_head", "parameter"]
    assert table_name(()) == "run"


def test_a_slot_is_found_by_the_rule_that_the_written_form_states():
    registry = _registry()
    written = json.loads(json.dumps(registry.to_dict()))
    assert (written["version"], written["slots"]) == (3, 28)
    plane = np.arange(28, dtype=np.float32)
    square = written["statistics"][1]
    axes = written["grids"][square["grid"]]
    for slot in range(square["first"], square["first"] + square["count"]):
        layer, expert = divmod(slot - square["first"], len(axes["expert"]))
        assert registry.view(plane, "square_sum")[layer, expert] == slot
        assert axes["layer"][layer] in (3, 4)
    assert (square["unit"], square["reduction"], square["vital"]) == ("1", "sum", True)


def test_the_written_form_reads_back_as_the_same_registry():
    registry = _registry()
    read = Registry.from_dict(json.loads(json.dumps(registry.to_dict())))
    assert read.statistics == registry.statistics
    assert read.derived == registry.derived
    assert read.identity == registry.identity
    other = Registry()
    other.add("rows", unit="tokens", reduction="sum", axes={"layer": [3, 4], "expert": range(6)}, vital=True)
    assert other.identity != registry.identity


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"slots": 29}, {"grids": []}, {"statistics": 3}, {"derived": [{"name": "x"}]}],
    ids=["another version", "slots do not add up", "no grids", "no list", "torn"],
)
def test_what_is_no_registry_is_refused(change):
    with pytest.raises(ValueError, match="registry"):
        Registry.from_dict(_registry().to_dict() | change)


HOSTILE = {
    "reduction": lambda form: form["statistics"][0].update(reduction="sum(1), (SELECT 1)) --"),
    "reduction that is a list": lambda form: form["statistics"][0].update(reduction=["sum"]),
    "name": lambda form: form["statistics"][0].update(name='x" FROM secrets --'),
    "unit": lambda form: form["statistics"][0].update(unit={"a": 1}),
    "axis name": lambda form: form["grids"][0].update({"x; DROP": [1]}),
    "axis values": lambda form: form["grids"][0].update(layer=[1.5, 2.5]),
    "axis values of two kinds": lambda form: form["grids"][0].update(layer=[1, "2"]),
    "axis without values": lambda form: form["grids"][0].update(layer=[]),
    "axes that are none": lambda form: form["grids"].__setitem__(0, 7),
    "derived name": lambda form: form["derived"][0].update(name="a b"),
    "infinite power": lambda form: form["derived"][0]["powers"].update(rows=float("inf")),
    "power beyond float": lambda form: form["derived"][0]["powers"].update(rows=10**400),
    "power": lambda form: form["derived"][0]["powers"].update(rows="1); --"),
    "truth as a power": lambda form: form["derived"][0]["powers"].update(rows=True),
}


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=list(HOSTILE))
def test_values_that_would_become_sql_are_held_to_their_kind(spoil):
    form = _registry().to_dict()
    assert Registry.from_dict(form).slots == form["slots"]
    spoil(form)
    with pytest.raises(ValueError, match="registry"):
        Registry.from_dict(form)


def test_derived_values_are_products_of_powers_and_nan_without_a_divisor():
    registry = _registry()
    plane = np.ones(registry.slots, np.float32)
    registry.view(plane, "square_sum")[...] = 8
    registry.view(plane, "rows")[...] = 2
    registry.view(plane, "rows")[1, 4] = 0
    rms = registry.values(plane, "rms")
    assert rms.shape == (2, 5)
    assert rms[0, 0] == 2
    assert np.isnan(rms[1, 4])
    assert registry.grid_of("rms") == registry.statistics["rows"].grid


def test_other_ranks_store_the_same_without_the_vitals():
    registry = _registry()
    own = registry.own()
    assert list(own.statistics) == ["gate_sum", "weight_max"]
    assert own.slots == registry.slots - registry.vital_slots
    assert list(own.derived) == ["squared"]
    plane = np.arange(registry.slots, dtype=np.float32)
    for name in own.statistics:
        np.testing.assert_array_equal(own.view(plane[registry.vital_slots :], name), registry.view(plane, name))


def test_vitals_are_sums_at_the_front_whose_means_are_derived():
    registry = Registry()
    register_vitals(registry, [2, 3], 4, world_size=3)
    assert registry.slots == registry.vital_slots == 3 + 4 * 3 + 4 * 2 + 6 * 8
    assert {"activation_rms", "out_norm", "weight_norm", "router_entropy"} <= set(registry.derived)
    dense = Registry()
    register_vitals(dense, [], 0, world_size=1)
    assert list(dense.statistics) == [
        "loss",
        "total_loss",
        "grad_norm",
        "step_time",
        "data_wait",
        "communication_time",
        "not_finite",
    ]
