"""The batch size of a stage as a function of its tokens."""

from steptron.config.schema import StageConfig


def batch_size_at(stage: StageConfig, stage_tokens: int) -> int:
    """Return the number of sequences in the step that begins after stage_tokens tokens of the stage."""
    return next((ramp.batch_size for ramp in stage.ramp if stage_tokens < ramp.until), stage.batch_size)
