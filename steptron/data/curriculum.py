"""A stage as the data sees it: tokens of the stage so far → batch size of the next step."""

from steptron.config.schema import StageConfig


def batch_size_at(stage: StageConfig, stage_tokens: int) -> int:
    """Sequences of the step that begins when the stage has taken stage_tokens tokens."""
    return next((ramp.batch_size for ramp in stage.ramp if stage_tokens < ramp.until), stage.batch_size)
