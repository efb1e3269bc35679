"""Cutting layers into pipeline stages: against trying every cut."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from steptron.config.schema import PipelineConfig
from steptron.model.flops import costs_per_token, flops_per_token
from steptron.parallel.pipeline_split import _even, cut, ranks_of_stages

from tiny import tiny_model


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 30), st.integers(1, 5))
def test_the_dearest_stage_is_as_cheap_as_can_be_and_the_rest_even(costs, end, stages):
    stages = min(stages, len(costs))
    every = []
    for inner in combinations(range(1, len(costs)), stages - 1):
        borders = [0, *inner, len(costs)]
        sums = [sum(costs[a:b]) for a, b in pairwise(borders)]
        sums[-1] += end
        every.append((max(sums), sum(s * s for s in sums)))
    lengths = _even(tuple(map(float, costs)), float(end), stages)
    assert sum(lengths) == len(costs)
    assert min(lengths) >= 1
    borders = [sum(lengths[:n]) for n in range(stages + 1)]
    sums = [sum(costs[a:b]) for a, b in pairwise(borders)]
    sums[-1] += end
    assert (max(sums), sum(s * s for s in sums)) == min(every)


def test_layers_of_every_kind_and_the_ends_have_their_costs():
    costs = costs_per_token(tiny_model(), 20)
    assert len(costs.layers) == 6
    long = costs_per_token(tiny_model(), 2000)
    assert long.layers[4] > 2 * costs.layers[4], "a full layer sees all earlier keys"
    assert long.layers[5] < 1.1 * costs.layers[5], "a sliding one does not"
    without = costs_per_token(tiny_model(num_mtp_heads=0), 20)
    assert costs.ends > 2 * without.ends, "each MTP head has an output matrix of its own"
    assert sum(costs.layers) + costs.ends == pytest.approx(flops_per_token(tiny_model(), 20))


def test_parts_cover_the_network_and_written_lengths_are_kept():
    parts = cut(tiny_model(), PipelineConfig(layers=(1, 3, 2)), 3, 20)
    assert [(p.start, p.stop, p.first, p.last) for p in parts] == [
        (0, 1, True, False),
        (1, 4, False, False),
        (4, 6, False, True),
    ]
    assert sum(p.stop - p.start for p in cut(tiny_model(), PipelineConfig(), 4, 20)) == 6


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("1f1b", [0, 1]),
        ("interleaved", [0, 1, 0, 1, 0, 1]),
        ("zb-v", [0, 1, 1, 0]),
        ("dualpipe-v", [0, 1, 1, 0]),
    ],
)
def test_schedules_lay_stages_round_or_in_a_v(schedule, expected):
    assert ranks_of_stages(PipelineConfig(schedule=schedule, chunks=3), 2) == expected
