"""The rates at the step of a resumption: a longer stage does not raise them unasked, and what differs is told."""

from dataclasses import replace

import pytest
from steptron.config.schema import BalanceConfig, LrConfig
from steptron.errors import RecipeError
from steptron.optim.schedule import rates
from steptron.train.batch import step_settings
from steptron.train.counters import Counters
from steptron.train.rates import compare_rates

from tiny import tiny_stage

STAGE = tiny_stage(tokens=1000, seq_len=10, batch_size=10, balance=BalanceConfig(bias_rate=1e-3))
FALLING = {
    "linear": LrConfig(kind="linear", peak=1.0, end=0.1),
    "cosine": LrConfig(kind="cosine", peak=1.0, end=0.1),
    "wsd": LrConfig(kind="wsd", peak=1.0, end=0.1, decay=300),
}
CONSTANT = LrConfig(peak=1.0)


def at(tokens: int, stage: str = "long") -> Counters:
    return Counters(step=tokens // 100, stage=stage, stage_tokens=tokens)


def compare(stage, done: int, **changes) -> list[str]:
    """Return the lines of a resumption after `done` tokens of a stage of 1,000 tokens."""
    return compare_rates({"long": stage}, {"long": replace(stage, **changes)}, at(done))


@pytest.mark.parametrize("kind", FALLING)
@pytest.mark.parametrize("tokens", [800, 1000], ids=["in its fall", "finished"])
def test_a_longer_stage_would_heat_up_again_and_is_asked_about(kind: str, tokens: int) -> None:
    stage = replace(STAGE, lr=FALLING[kind])
    with pytest.raises(RecipeError) as caught:
        compare(stage, tokens, tokens=2000)
    old, new = rates(stage, tokens + 100).lr, rates(replace(stage, tokens=2000), tokens + 100).lr
    assert new > old
    assert str(caught.value) == (
        "stages.long.tokens=2000 stretches the stage's schedules, which end at 1000 tokens now: "
        f"step {tokens // 100 + 1} would have the learning rate {new:.4g} instead of {old:.4g}; "
        "stages.long.schedule_tokens=1000 keeps the old rates, stages.long.schedule_tokens=2000 takes the new ones"
    )
    assert compare(stage, tokens, tokens=2000, schedule_tokens=1000) == []
    assert compare(stage, tokens, tokens=2000, schedule_tokens=2000) == [
        f"step {tokens // 100 + 1} in stage long has the learning rate {new:.4g} instead of {old:.4g}"
    ]


def test_a_router_bias_that_would_learn_faster_again_is_asked_about_too() -> None:
    stage = replace(STAGE, lr=CONSTANT, balance=BalanceConfig(bias_rate=1.0, bias_rate_end=0.0))
    with pytest.raises(RecipeError, match=r"step 11 would have the router's bias rate 0\.45 instead of 0; "):
        compare(stage, 1000, tokens=2000)


def test_what_raises_no_rate_is_not_asked_about() -> None:
    assert compare(replace(STAGE, lr=CONSTANT), 1000, tokens=2000) == []
    assert compare(replace(STAGE, lr=FALLING["wsd"]), 300, tokens=2000) == [], "the fall of wsd begins later"
    shorter = compare(replace(STAGE, lr=FALLING["linear"]), 300, tokens=600)
    assert shorter == ["step 4 in stage long has the learning rate 0.4 instead of 0.64"]
    assert compare(replace(STAGE, lr=FALLING["cosine"]), 1000) == []
    assert compare(STAGE, 500, lr=LrConfig(peak=2.0)) == [
        "step 6 in stage long has the learning rate 2 instead of 0.001"
    ]


def test_a_budget_of_a_stage_that_was_left_has_no_effect_and_that_is_told() -> None:
    stages = {"base": STAGE, "long": STAGE}
    longer = {**stages, "base": replace(STAGE, tokens=5000)}
    assert compare_rates(stages, longer, at(100)) == [
        "stages.base.tokens=5000 has no effect, because the run has left stage base"
    ]
    assert compare_rates(stages, longer, at(100, "base")) == []
    assert compare_rates(stages, longer, Counters()) == []


@pytest.mark.parametrize("kind", [*FALLING, "constant"])
def test_a_schedule_does_not_depend_on_when_the_budget_was_raised(kind: str) -> None:
    """The steps of a stage that is extended with its schedule kept are those of one that had all tokens at once."""
    whole = replace(STAGE, lr=FALLING.get(kind, CONSTANT), tokens=2000, schedule_tokens=1250)
    first = replace(whole, tokens=1010)
    steps = range(0, 1100, 100)
    assert [step_settings(first, tokens, 10, 1.0) for tokens in steps] == [
        step_settings(whole, tokens, 10, 1.0) for tokens in steps
    ]
    behind = [step_settings(whole, tokens, 10, 1.0).lr for tokens in range(1200, 2000, 100)]
    assert behind == pytest.approx([0.1 if kind in FALLING else 1.0] * 8)
