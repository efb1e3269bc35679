"""Learning rate and bias rate as functions of the stage's tokens: no state, the same at resume and on any layout."""

import math
from typing import NamedTuple

from steptron.config.schema import BalanceConfig, LrConfig, StageConfig


class Rates(NamedTuple):
    """The rates of a step that follow schedules."""

    lr: float
    """The learning rate."""
    bias_rate: float
    """The rate of the router bias."""


def schedule_budget(stage: StageConfig) -> int:
    """Return the tokens of the stage at which its schedules end."""
    return stage.tokens if stage.schedule_tokens is None else stage.schedule_tokens


def rates(stage: StageConfig, tokens: int) -> Rates:
    """Return the rates of the step that reaches `tokens` tokens of the stage."""
    budget = schedule_budget(stage)
    biases = 0.0 if stage.balance.freeze_router else bias_rate(stage.balance, tokens, budget)
    return Rates(learning_rate(stage.lr, tokens, budget), biases)


def learning_rate(lr: LrConfig, tokens: int, budget: int) -> float:
    """Return the learning rate when `tokens` of the stage's `budget` are reached: a linear warm-up, then the segment's
    kind."""
    if tokens < lr.warmup:
        return lr.start + (lr.peak - lr.start) * tokens / lr.warmup
    if lr.kind == "constant":
        return lr.peak
    assert lr.end is not None, "validation asks for `end` with every kind that falls"
    begin = budget - lr.decay if lr.kind == "wsd" else lr.warmup
    share = min(max((tokens - begin) / max(budget - begin, 1), 0.0), 1.0)
    if lr.kind == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return lr.peak + (lr.end - lr.peak) * share


def bias_rate(balance: BalanceConfig, tokens: int, budget: int) -> float:
    """Return the rate of the router bias when `tokens` of the stage's `budget` are reached: constant, or linear to its
    end."""
    if balance.bias_rate_end is None:
        return balance.bias_rate
    return balance.bias_rate + (balance.bias_rate_end - balance.bias_rate) * min(tokens / budget, 1.0)
