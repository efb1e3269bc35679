"""Cutting the network into pipeline stages: against trying every cut, and on the published model."""

from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from steptron.config.resolve import resolve
from steptron.config.schema import ParallelConfig, PipelineConfig, Recipe
from steptron.model.flops import flops_per_token, unit_costs
from steptron.model.parts import units_of
from steptron.parallel.pipeline_split import _even, cut, load_of_ranks, ranks_of_stages

from tiny import tiny_model, tiny_recipe


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 5))
def test_the_dearest_stage_is_as_cheap_as_can_be_and_the_rest_even(costs, stages):
    stages = min(stages, len(costs))
    every = []
    for inner in combinations(range(1, len(costs)), stages - 1):
        borders = [0, *inner, len(costs)]
        sums = [sum(costs[a:b]) for a, b in pairwise(borders)]
        every.append((max(sums), sum(s * s for s in sums)))
    lengths = _even(tuple(map(float, costs)), stages)
    assert sum(lengths) == len(costs)
    assert min(lengths) >= 1
    borders = [sum(lengths[:n]) for n in range(stages + 1)]
    sums = [sum(costs[a:b]) for a, b in pairwise(borders)]
    assert (max(sums), sum(s * s for s in sums)) == min(every)


def test_units_of_every_kind_have_their_costs():
    model = tiny_model()
    costs, long = (dict(zip(units_of(model), unit_costs(model, T), strict=True)) for T in (20, 2000))
    assert long["attention", 4] > 2 * costs["attention", 4], "full attention sees all earlier keys"
    assert long["attention", 5] < 1.3 * costs["attention", 5], "a sliding one does not"
    assert long["ffn", 4] == costs["ffn", 4]
    assert costs["output", 0] == costs["output", 2] == 6 * model.hidden_size * model.vocab_size
    joined = 6 * 2 * model.hidden_size**2
    assert costs["block", 1] == pytest.approx(costs["attention", 5] + costs["ffn", 0] + joined), "sliding and dense"
    assert sum(costs.values()) == pytest.approx(flops_per_token(model, 20))
    assert unit_costs(model, 20, mtp_heads=1)[-4:] == (costs["block", 1], 0, costs["output", 1], 0)


def published(heads: int, schedule: str = "1f1b", chunks: int = 2) -> Recipe:
    overrides = [f"model.num_mtp_heads={heads}", f"parallel.pipeline.schedule={schedule}"]
    return resolve("step3p5_flash", [*overrides, f"parallel.pipeline.chunks={chunks}"], None)


@pytest.mark.parametrize(("heads", "most"), [(3, 1.10), (1, 1.06)])
def test_ranks_of_the_published_model_have_the_same_work(heads: int, most: float) -> None:
    """The time that a pipeline waits for its busiest rank. Interleaved schedules have no less even ranks."""
    one_each = max(load_of_ranks(published(heads), 8))
    assert one_each <= most
    for schedule, chunks in (("interleaved", 2), ("interleaved", 3), ("zb-v", 2)):
        assert max(load_of_ranks(published(heads, schedule, chunks), 8)) <= one_each + 1e-9


def piped(pp: int, layers: tuple[int, ...] = (), **changes) -> Recipe:
    recipe, parallel = (
        tiny_recipe(Path("corpus"), Path("run")),
        ParallelConfig(pp=pp, pipeline=PipelineConfig(layers=layers)),
    )
    return replace(recipe, model=tiny_model(**changes), parallel=parallel)


@pytest.mark.parametrize(
    ("layers", "stages"),
    [
        ((1, 3, 2), [(0,), (1, 2, 3), (4, 5)]),
        ((0, 6), [(), (0, 1, 2, 3, 4, 5)]),
        ((4, 2, 0, 0), [(0, 1, 2, 3), (4, 5), (), ()]),
        ((6, 0), [(0, 1, 2, 3, 4, 5), ()]),
    ],
)
def test_written_lengths_are_kept_and_ends_follow(layers: tuple[int, ...], stages: list[tuple[int, ...]]) -> None:
    recipe = piped(len(layers), layers)
    parts = cut(recipe, len(layers))
    assert [part.ffns for part in parts] == [part.attentions for part in parts] == stages
    assert [unit for part in parts for unit in part.units] == list(units_of(recipe.model))
    assert all(part.units for part in parts)


def test_parts_cover_the_network() -> None:
    for pp in range(1, 9):
        parts = cut(piped(pp), pp)
        assert [unit for part in parts for unit in part.units] == list(units_of(piped(pp).model))
        assert [part.first for part in parts] == [True] + [False] * (pp - 1)
        assert [part.last for part in parts] == [False] * (pp - 1) + [True]


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
