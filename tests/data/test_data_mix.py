import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from steptron.data.mix import Mixture

WEIGHTS = st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=7).map(
    lambda values: {f"s{index}": value for index, value in enumerate(values)}
)
SEEDS = st.integers(0, 2**32)


@given(weights=WEIGHTS, seed=SEEDS, length=st.integers(1, 600))
def test_ordinals_have_no_gaps_and_every_prefix_follows_the_weights(weights, seed, length) -> None:
    mixture, total = Mixture(weights, seed, "base"), sum(weights.values())
    seen: Counter[str] = Counter()
    for index in range(length):
        name, ordinal = mixture.locate(index)
        assert ordinal == seen[name]
        seen[name] += 1
        for source, weight in weights.items():
            assert abs(seen[source] - (index + 1) * weight / total) < math.log2(index + 2) / 2 + 2


@given(weights=WEIGHTS, seed=SEEDS, start=st.integers(0, 10**9))
def test_counts_far_into_a_stage_follow_the_weights(weights, seed, start) -> None:
    mixture, total = Mixture(weights, seed, "base"), sum(weights.values())
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index in range(start, start + 300):
        name, ordinal = mixture.locate(index)
        assert ordinal == last.get(name, ordinal - 1) + 1
        last[name] = ordinal
        first.setdefault(name, ordinal)
        # The ordinal is the number of the source's earlier samples, from the stage's start.
        assert abs(ordinal - index * weights[name] / total) < 20


def test_a_long_run_is_far_closer_to_the_weights_than_chance() -> None:
    weights = {"web": 0.613, "code": 0.3, "books": 0.087}
    mixture, seen, worst = Mixture(weights, 3, "base"), Counter(), 0.0
    for index in range(50_000):
        seen[mixture.locate(index)[0]] += 1
        worst = max(worst, *(abs(seen[name] - weight * (index + 1)) for name, weight in weights.items()))
    assert worst < 6  # random draws: about 100


def test_locate_is_a_pure_function_of_seed_stage_and_index() -> None:
    def draws(seed: int, stage: str, indices: range) -> list[tuple[str, int]]:
        mixture = Mixture({"a": 1, "b": 2, "c": 3}, seed, stage)
        return [mixture.locate(index) for index in indices]

    forward = draws(1, "base", range(200))
    assert draws(1, "base", range(199, -1, -1))[::-1] == forward
    assert draws(2, "base", range(200)) != forward
    assert draws(1, "long", range(200)) != forward


@given(weights=WEIGHTS, seed=SEEDS, length=st.integers(0, 400))
def test_counts_are_those_of_the_samples_one_by_one(weights, seed, length) -> None:
    mixture = Mixture(weights, seed, "base")
    counted = Counter(mixture.locate(index)[0] for index in range(length))
    assert mixture.counts(length) == {name: counted[name] for name in weights}


def test_the_order_of_names_in_a_recipe_is_of_no_matter() -> None:
    one, two = Mixture({"a": 1, "b": 2}, 7, "base"), Mixture({"b": 2, "a": 1}, 7, "base")
    assert [one.locate(index) for index in range(100)] == [two.locate(index) for index in range(100)]


@pytest.mark.parametrize("weights", [{"a": 0, "b": 1, "c": 0}, {"b": 5}], ids=["zeros", "single"])
def test_a_source_without_weight_is_never_drawn(weights) -> None:
    assert [Mixture(weights, 0, "s").locate(index) for index in range(100)] == [("b", index) for index in range(100)]
