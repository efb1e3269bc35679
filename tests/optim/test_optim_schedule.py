"""Learning rate and bias rate at their corners: warm-up, continuity, the two ends of every kind."""

from itertools import pairwise

import pytest
from steptron.config.schema import BalanceConfig, LrConfig
from steptron.optim.schedule import bias_rate, learning_rate

BUDGET = 1000
KINDS = {
    "constant": LrConfig(kind="constant", peak=3e-4, start=1e-5, warmup=100),
    "linear": LrConfig(kind="linear", peak=3e-4, end=2e-5, start=1e-5, warmup=100),
    "cosine": LrConfig(kind="cosine", peak=3e-4, end=2e-5, start=1e-5, warmup=100),
    "wsd": LrConfig(kind="wsd", peak=3e-4, end=2e-5, start=1e-5, warmup=100, decay=300),
}
each_kind = pytest.mark.parametrize("lr", KINDS.values(), ids=KINDS.keys())


@each_kind
def test_warm_up_is_a_line_from_start_to_peak(lr: LrConfig):
    assert learning_rate(lr, 0, BUDGET) == 1e-5
    assert learning_rate(lr, 50, BUDGET) == pytest.approx((1e-5 + 3e-4) / 2)
    assert learning_rate(lr, 100, BUDGET) == 3e-4


@each_kind
def test_there_is_no_jump(lr: LrConfig):
    """A token changes the rate by no more than the steepest of warm-up, cosine (π/2 of its line) and wsd's fall
    does."""
    rates = [learning_rate(lr, tokens, BUDGET) for tokens in range(BUDGET + 1)]
    assert max(abs(b - a) for a, b in pairwise(rates)) < 1.01 * (3e-4 - 1e-5) / 100


@each_kind
def test_the_stage_ends_where_it_should_and_stays_there(lr: LrConfig):
    end = 3e-4 if lr.kind == "constant" else 2e-5
    assert learning_rate(lr, BUDGET, BUDGET) == pytest.approx(end, rel=1e-12)
    assert learning_rate(lr, BUDGET + 77, BUDGET) == pytest.approx(end, rel=1e-12)


@each_kind
def test_without_warm_up_the_first_token_has_the_peak(lr: LrConfig):
    bare = LrConfig(kind=lr.kind, peak=lr.peak, end=lr.end, decay=lr.decay)
    assert learning_rate(bare, 0, BUDGET) == 3e-4


@pytest.mark.parametrize(
    ("kind", "tokens", "expected"),
    [
        ("linear", 550, (3e-4 + 2e-5) / 2),
        ("linear", 325, 3e-4 - 0.25 * 2.8e-4),
        ("cosine", 550, (3e-4 + 2e-5) / 2),
        ("cosine", 325, 2e-5 + 2.8e-4 * (2 + 2**0.5) / 4),
        ("wsd", 699, 3e-4),
        ("wsd", 700, 3e-4),
        ("wsd", 850, (3e-4 + 2e-5) / 2),
        ("constant", 850, 3e-4),
    ],
    ids=lambda value: str(value),
)
def test_between_the_corners(kind: str, tokens: int, expected: float):
    assert learning_rate(KINDS[kind], tokens, BUDGET) == pytest.approx(expected, rel=1e-12)


def test_a_fall_may_also_rise():
    lr = LrConfig(kind="linear", peak=1e-4, end=2e-4)
    assert learning_rate(lr, 500, BUDGET) == pytest.approx(1.5e-4)


def test_wsd_that_falls_right_after_warm_up():
    lr = LrConfig(kind="wsd", peak=1.0, end=0.0, warmup=400, decay=600)
    assert [learning_rate(lr, t, BUDGET) for t in (200, 400, 700, 1000)] == pytest.approx([0.5, 1.0, 0.5, 0.0])


def test_bias_rate_is_constant_without_an_end():
    balance = BalanceConfig(bias_rate=1e-3)
    assert [bias_rate(balance, t, BUDGET) for t in (0, 500, 1000, 1100)] == [1e-3] * 4


def test_bias_rate_falls_on_a_line_to_its_end():
    balance = BalanceConfig(bias_rate=1e-3, bias_rate_end=0.0)
    rates = [bias_rate(balance, t, BUDGET) for t in (0, 250, 1000, 1100)]
    assert rates == pytest.approx([1e-3, 7.5e-4, 0.0, 0.0])
