import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steptron.data.mix import Mixture

ONE = 1 + 1e-9  # the weights and the sums here are floats
WEIGHTS = st.lists(st.one_of(st.floats(1e-3, 1.0), st.floats(1e-6, 1e-3)), min_size=1, max_size=7).map(
    lambda values: {f"s{index}": value for index, value in enumerate(values)}
)


def worst_deviations(weights: dict[str, float], first: int, length: int) -> dict[str, float]:
    """The largest distance of each source's count to its share over the prefixes that end in this range."""
    mixture, total = Mixture(weights), sum(weights.values())
    seen = Counter(mixture.counts(first))
    worst = dict.fromkeys(weights, 0.0)
    for index in range(first, first + length):
        name, ordinal = mixture.locate(index)
        assert ordinal == seen[name], "no gaps and no repeats"
        seen[name] += 1
        for source, weight in weights.items():
            worst[source] = max(worst[source], abs(seen[source] - (index + 1) * weight / total))
    return worst


@given(weights=WEIGHTS, length=st.integers(1, 700))
def test_every_source_is_within_one_sample_of_its_weight_at_every_prefix(weights, length) -> None:
    assert max(worst_deviations(weights, 0, length).values()) <= ONE


@settings(max_examples=30)
@given(weights=WEIGHTS, first=st.integers(0, 10**11))
def test_so_it_is_far_into_a_stage(weights, first) -> None:
    worst = max(worst_deviations(weights, first, 200).values())
    assert worst <= ONE + 1e-4  # the floats of the weights, times 1e11


@pytest.mark.parametrize(
    "weights",
    [
        {"a": 1, "b": 1, "c": 1},
        {"a": 0.5, "b": 0.25, "c": 0.25},
        {"a": 0.45, "b": 0.45, "c": 0.1},
        {"a": 0.9, "b": 0.05, "c": 0.045, "d": 0.005},
        {f"s{n}": 1.0 for n in range(20)},
        {f"s{n}": 0.6**n for n in range(12)},
    ],
    ids=["equal", "dyadic", "two heavy", "one heavy", "many", "falling"],
)
def test_weights_that_meet_each_other_often_stay_within_one_sample_too(weights) -> None:
    assert max(worst_deviations(weights, 0, 5000).values()) <= ONE


@pytest.mark.parametrize("first", [0, 10**9 + 7])
@pytest.mark.parametrize(
    "weights",
    [
        {"web": 0.7, "code": 0.2996, "x": 1e-4, "y": 1e-4, "z": 2e-4},
        {"web": 0.9, "x": 1e-3, "y": 5e-4, "z": 3e-5, "books": 0.0123},
        {"web": 1.0, "x": 1e-6},
        {f"s{n}": 1.0 for n in range(700)},
    ],
    ids=["a few", "very different", "one", "all"],
)
def test_rare_sources_are_within_one_sample_and_let_the_others_be(weights, first: int) -> None:
    assert max(worst_deviations(weights, first, 3000 if len(weights) < 9 else 900).values()) <= ONE + 1e-6


def test_thousands_of_rare_sources_are_drawn_alike() -> None:
    mixture = Mixture({f"s{n:04d}": 1.0 for n in range(2500)})
    assert set(mixture.counts(25_001).values()) <= {10, 11}
    assert math.isclose(sum(mixture.counts(777).values()), 777)


def test_locate_is_a_pure_function_of_the_index() -> None:
    weights = {"a": 1, "b": 2, "c": 3.5}
    forward = [Mixture(weights).locate(index) for index in range(0, 3000, 7)]
    mixture = Mixture(weights)
    assert [mixture.locate(index) for index in range(2996, -1, -7)][::-1] == forward


@given(weights=WEIGHTS, length=st.integers(0, 400))
def test_counts_are_those_of_the_samples_one_by_one(weights, length) -> None:
    mixture = Mixture(weights)
    counted = Counter(mixture.locate(index)[0] for index in range(length))
    assert mixture.counts(length) == {name: counted[name] for name in weights}


def test_the_order_of_names_in_a_recipe_is_of_no_matter() -> None:
    one, two = Mixture({"a": 1, "b": 2, "c": 1}), Mixture({"c": 1, "b": 2, "a": 1})
    assert [one.locate(index) for index in range(100)] == [two.locate(index) for index in range(100)]


@pytest.mark.parametrize("weights", [{"a": 0, "b": 1, "c": 0}, {"b": 5}], ids=["zeros", "single"])
def test_a_source_without_weight_is_never_drawn(weights) -> None:
    mixture = Mixture(weights)
    assert [mixture.locate(index) for index in range(100)] == [("b", index) for index in range(100)]
    assert mixture.counts(9) == {name: 9 if name == "b" else 0 for name in weights}
