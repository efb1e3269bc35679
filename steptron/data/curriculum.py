"""A stage as the data sees it: which samples its n-th step takes. Pure arithmetic over the stage's budget and ramp.

StageConfig → runs of equal batches → step n → (first sample, batch size, tokens before it)
"""

from collections.abc import Iterator
from typing import NamedTuple

from steptron.config.schema import StageConfig


class Step(NamedTuple):
    """One optimizer step of a stage: it takes the samples first_sample … first_sample + batch_size − 1."""

    first_sample: int
    """Index in the stage, from 0, over all ranks."""
    batch_size: int
    """Sequences."""
    tokens_before: int
    """Tokens of the stage that earlier steps took."""


def batch_size_at(stage: StageConfig, stage_tokens: int) -> int:
    """Sequences of the step that begins when the stage has taken stage_tokens tokens."""
    return next((ramp.batch_size for ramp in stage.ramp if stage_tokens < ramp.until), stage.batch_size)


def plan_steps(stage: StageConfig) -> int:
    """Steps of the stage; the last one is the one that reaches its budget."""
    return sum(num_steps for num_steps, _ in _runs(stage))


def step_at(stage: StageConfig, step: int) -> Step:
    """What step `step` (from 0) of the stage takes."""
    assert 0 <= step < plan_steps(stage), f"step {step} outside of the stage's {plan_steps(stage)}"
    first_sample, left = 0, step
    for num_steps, batch_size in _runs(stage):
        first_sample += min(left, num_steps) * batch_size
        if left < num_steps:
            return Step(first_sample, batch_size, first_sample * stage.seq_len)
        left -= num_steps
    raise AssertionError("the runs of a stage hold all of its steps")


def _runs(stage: StageConfig) -> Iterator[tuple[int, int]]:
    """(number of steps, batch size) of the stretches with one batch size, in order."""
    tokens = 0
    while tokens < stage.tokens:
        batch_size = batch_size_at(stage, tokens)
        until = min((ramp.until for ramp in stage.ramp if tokens < ramp.until), default=stage.tokens)
        num_steps = -(-(min(until, stage.tokens) - tokens) // (batch_size * stage.seq_len))
        yield num_steps, batch_size
        tokens += num_steps * batch_size * stage.seq_len
