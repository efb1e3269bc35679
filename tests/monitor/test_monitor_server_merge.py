"""Planes of ranks with different registries, put together and compared cell by cell."""

import json

import numpy as np
import pytest
from steptron.monitor.server.journal import Journal
from steptron.monitor.statistics.merge import Merged, MismatchError, check_match
from steptron.monitor.statistics.registry import Registry
from steptron.monitor.storage.coverage import Coverage, format_ranks, parse_ranks

from plane_server import rank_registry

CELLS = {
    "blocks": [([0, 1], [0, 1, 2]), ([0, 1], [3, 4, 5]), ([2, 3], [0, 1, 2]), ([2, 3], [3, 4, 5])],
    "every other layer": [([0, 2, 4], [0, 1]), ([1, 3, 5], [0, 1])],
    "no order": [([5, 1, 3], [4, 0]), ([2, 0], [1, 4, 3])],
    "shared": [([0, 1], [0, 1, 2]), ([1, 2], [1, 2, 3]), ([0, 1, 2], [0, 1, 2, 3])],
    "holes": [([0], [0]), ([1], [1])],
    "one rank": [([3, 7], [2, 9])],
}


def _member(layers, experts, names) -> Registry:
    registry = Registry()
    for name, reduction in names.items():
        registry.add(name, unit="1", reduction=reduction, axes={"layer": layers, "expert": experts})
    registry.add("norm", unit="1", reduction="sum", axes={"parameter": [f"layer.{layer}" for layer in layers]})
    registry.add("rows", unit="1", reduction="sum", axes={})
    return registry


def _by_cell(members, planes) -> dict[tuple, float]:
    reduce = {"sum": np.add, "max": np.maximum}
    cells: dict[tuple, float] = {}
    for rank, registry in members.items():
        for name, statistic in registry.statistics.items():
            for index, value in np.ndenumerate(registry.view(planes[rank], name)):
                at = (name, *(axis.values[i] for axis, i in zip(statistic.grid, index, strict=True)))
                cells[at] = reduce[statistic.reduction](cells[at], value) if at in cells else value
    return cells


@pytest.mark.parametrize("cells", CELLS.values(), ids=list(CELLS))
@pytest.mark.parametrize("left_out", [0, 1], ids=["all ranks", "one missing"])
def test_every_cell_is_the_reduction_of_those_who_have_it(cells, left_out):
    names = {"total": "sum", "high": "max"}
    members = {rank: _member(*axes, names) for rank, axes in enumerate(cells)}
    random = np.random.default_rng(0)
    planes = {rank: random.integers(-99, 99, registry.slots).astype(np.float32) for rank, registry in members.items()}
    there = {rank: registry for rank, registry in members.items() if rank >= left_out}
    merged = Merged(members)
    plane = np.full(merged.registry.slots, -12345, np.float32)
    merged.reduce([(rank, planes[rank]) for rank in there], plane)
    absent = merged.absent(there)
    expected = _by_cell(there, planes)
    found = {}
    for name, statistic in merged.registry.statistics.items():
        values = merged.registry.view(plane, name)
        missing = np.zeros(statistic.shape, bool) if absent is None else merged.registry.view(absent, name)
        for index in np.ndindex(statistic.shape):
            if not missing[index]:
                at = (name, *(axis.values[i] for axis, i in zip(statistic.grid, index, strict=True)))
                found[at] = values[index]
    assert found == expected


def test_vital_statistics_stay_at_the_front_and_derived_ones_stay():
    merged = Merged({1: rank_registry(1), 0: rank_registry(0)})
    assert list(merged.registry.statistics)[:2] == ["loss", "tokens"]
    assert merged.registry.vital_slots == rank_registry(0).vital_slots
    assert list(merged.registry.derived) == ["rms"]


def test_ranks_must_mean_the_same():
    mine, other = Registry(), Registry()
    mine.add("x", unit="s", reduction="sum", axes={"layer": [1]})
    other.add("x", unit="s", reduction="sum", axes={"expert": [1]})
    with pytest.raises(MismatchError, match="statistic 'x'"):
        check_match(mine, {3: other})
    check_match(mine, {3: mine})


def test_coverage_is_short_however_long_the_run():
    coverage = Coverage()
    for step in range(1, 10_001):
        coverage.add(step, range(16))
    coverage.add(10_001, [0, 1, 2, 5])
    coverage.add(10_001, [3])
    written = json.loads(json.dumps(coverage.to_json()))
    assert written == [[1, 10_000, "0-15"], [10_001, 10_001, "0-2,5"], [10_001, 10_001, "3"]]
    again = Coverage(written)
    assert again.ranks(10_001) == {0, 1, 2, 3, 5}
    again.truncate_after(9)
    assert dict(again) == {step: frozenset(range(16)) for step in range(1, 10)}


@pytest.mark.parametrize(("ranks", "text"), [([], ""), ([4], "4"), ([3, 0, 1, 2, 9, 7, 8], "0-3,7-9")])
def test_ranks_as_text(ranks, text):
    assert format_ranks(ranks) == text
    assert list(parse_ranks(text)) == sorted(ranks)


def test_a_flood_of_refusals_is_a_few_lines(tmp_path):
    journal = Journal(tmp_path / "logs" / "server.jsonl", "here:1")
    for _ in range(2345):
        journal.refuse("slots", "7 of 8")
    journal.refuse("wrong token", "DoPut")
    lines = [json.loads(line) for line in (tmp_path / "logs" / "server.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["count"]) for line in lines] == [
        ("slots", 1),
        ("slots", 10),
        ("slots", 100),
        ("slots", 1000),
        ("wrong token", 1),
    ]
    assert journal.refused == {"slots": 2345, "wrong token": 1}
