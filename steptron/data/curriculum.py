"""The plan of a run: stage and sample numbers of every step, without samples that a rewind left out.

    stages, position, windows left out ─► coming_steps ─► StepPlan of every step to the end of the run

The plan is a function of the recipe and of four numbers, so a checkpoint keeps nothing else of the data order.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from steptron.config.schema import StageConfig


class Position(Protocol):
    """The place of a run in its curriculum, between two steps. All counts are over all ranks."""

    @property
    def step(self) -> int:
        """The number of steps done."""
        ...

    @property
    def stage(self) -> str:
        """The stage of the last step. Empty before the first one."""
        ...

    @property
    def stage_tokens(self) -> int:
        """The tokens of that stage that are done."""
        ...

    @property
    def stage_samples(self) -> int:
        """The index of the next sample of that stage."""
        ...


class Window(NamedTuple):
    """Samples [first, stop) of a stage that the run leaves out, because a rewind has found them harmful."""

    stage: str
    first: int
    stop: int


class StepPlan(NamedTuple):
    """The samples that a step trains on."""

    step: int
    """The number of the step, from 1."""
    stage: str
    """The name of its stage."""
    samples: range
    """The sample indices of the global batch, within the stage."""


def batch_size_at(stage: StageConfig, stage_tokens: int) -> int:
    """Return the number of sequences in the step that begins after stage_tokens tokens of the stage."""
    return next((ramp.batch_size for ramp in stage.ramp if stage_tokens < ramp.until), stage.batch_size)


def num_steps(stage: StageConfig, stage_tokens: int = 0) -> int:
    """Return the number of steps that a stage has left after stage_tokens tokens of it, without making their plans."""
    return _rest(stage, stage_tokens)[0]


def trained_tokens(stage: StageConfig) -> int:
    """Return the tokens of a whole stage: its budget, up to the end of the step that reaches it."""
    return _rest(stage, 0)[1]


def _rest(stage: StageConfig, stage_tokens: int) -> tuple[int, int]:
    """Return the number of steps that a stage has left after stage_tokens tokens of it, and its tokens at its end."""
    steps, done = 0, stage_tokens
    for until, rows in [*((ramp.until, ramp.batch_size) for ramp in stage.ramp), (stage.tokens, stage.batch_size)]:
        count = max(0, -(-(min(until, stage.tokens) - done) // (rows * stage.seq_len)))
        steps, done = steps + count, done + count * rows * stage.seq_len
    return steps, done


def last_step(stages: Mapping[str, StageConfig], position: Position) -> int:
    """Return the number of the last step of the run, as seen from `position`."""
    names = list(stages)
    coming = names[names.index(position.stage) if position.stage else 0 :]
    return position.step + sum(
        num_steps(stages[name], position.stage_tokens if name == position.stage else 0) for name in coming
    )


def coming_steps(
    stages: Mapping[str, StageConfig], position: Position, windows: Sequence[Window]
) -> Iterator[StepPlan]:
    """Yield the plan of every step from `position` to the end of the run."""
    names, step = list(stages), position.step
    for name in names[names.index(position.stage) if position.stage else 0 :]:
        stage = stages[name]
        tokens, first = (position.stage_tokens, position.stage_samples) if name == position.stage else (0, 0)
        while tokens < stage.tokens:
            rows = batch_size_at(stage, tokens)
            first = _next_clear(name, first, rows, windows)
            step += 1
            yield StepPlan(step, name, range(first, first + rows))
            tokens += rows * stage.seq_len
            first += rows


def _next_clear(stage: str, first: int, rows: int, windows: Sequence[Window]) -> int:
    """Return the first sample, from `first` on, whose `rows` samples touch no window."""
    for window in sorted(window for window in windows if window.stage == stage):
        if window.first < first + rows and first < window.stop:
            first = window.stop
    return first


def coming_stage(stages: Mapping[str, StageConfig], position: Position) -> str:
    """Return the stage of the next step, or the last stage at the end of a run."""
    coming = next(coming_steps(stages, position, ()), None)
    return coming.stage if coming else list(stages)[-1]


def samples_of_steps(
    stages: Mapping[str, StageConfig], position: Position, windows: Sequence[Window], steps: range
) -> list[Window]:
    """Return the samples that a run at `position` will read in these steps. Neighbouring samples are one window."""
    found: list[Window] = []
    for plan in coming_steps(stages, position, windows):
        if plan.step >= steps.stop:
            break
        if plan.step in steps:
            window = Window(plan.stage, plan.samples.start, plan.samples.stop)
            if found and found[-1].stage == window.stage and found[-1].stop == window.first:
                window = found.pop()._replace(stop=window.stop)
            found.append(window)
    return found
