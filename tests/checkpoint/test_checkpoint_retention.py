"""The checkpoints that stay, by each rule alone and by all of them."""

import math

import pytest
from steptron.checkpoint.retention import Retention

STEPS = range(10, 110, 10)


@pytest.mark.parametrize(
    ("keep", "stay"),
    [
        (Retention(newest=1), {100}),
        (Retention(newest=3), {80, 90, 100}),
        (Retention(newest=99), set(STEPS)),
        (Retention(newest=1, every=30), {30, 60, 90, 100}),
        (Retention(newest=1, decisions=lambda: [35, 40, 41, 5]), {30, 40, 100}),
        (Retention(newest=1, decisions=lambda: [40]), {40, 100}),
        (Retention(newest=2, every=50, decisions=lambda: [25]), {20, 50, 90, 100}),
        (Retention(newest=1, losses=lambda: {20: 2.0, 40: 1.5, 60: 3.0, 45: 1.0}), {40, 100}),
        (Retention(newest=1, losses=lambda: {20: 2.0, 30: math.nan, 40: 2.0}), {20, 100}),
        (Retention(newest=1, losses=lambda: {30: math.nan, 35: 1.0}), {100}),
    ],
)
def test_rules(keep: Retention, stay: set[int]):
    assert keep.chosen(STEPS) == stay
    assert keep.chosen(reversed(STEPS)) == stay


def test_a_rule_is_asked_anew():
    decided = [25]
    keep = Retention(newest=1, decisions=lambda: decided)
    assert keep.chosen(STEPS) == {20, 100}
    decided.append(55)
    assert keep.chosen(STEPS) == {20, 50, 100}
