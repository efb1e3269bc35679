"""A stage as the data sees it: how large its batches are, and how many. Pure arithmetic over its budget and ramp.

StageConfig, tokens of the stage so far → batch size of the next step
StageConfig → runs of equal batches → number of steps
"""

from collections.abc import Iterator

from steptron.config.schema import StageConfig


def batch_size_at(stage: StageConfig, stage_tokens: int) -> int:
    """Sequences of the step that begins when the stage has taken stage_tokens tokens."""
    return next((ramp.batch_size for ramp in stage.ramp if stage_tokens < ramp.until), stage.batch_size)


def plan_steps(stage: StageConfig) -> int:
    """Steps of the stage; the last one is the one that reaches its budget."""
    return sum(num_steps for num_steps, _ in _runs(stage))


def _runs(stage: StageConfig) -> Iterator[tuple[int, int]]:
    """(number of steps, batch size) of the stretches with one batch size, in order."""
    tokens = 0
    while tokens < stage.tokens:
        batch_size = batch_size_at(stage, tokens)
        until = min((ramp.until for ramp in stage.ramp if tokens < ramp.until), default=stage.tokens)
        num_steps = -(-(min(until, stage.tokens) - tokens) // (batch_size * stage.seq_len))
        yield num_steps, batch_size
        tokens += num_steps * batch_size * stage.seq_len
