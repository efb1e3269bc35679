"""Where a run is: counters, nothing else. Data order, learning rate and stage follow from them and the recipe.

counters, stages, windows left out ─► coming_steps ─► the plan of every step to the end of the run
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from steptron.config.schema import StageConfig
from steptron.data.curriculum import batch_size_at
from steptron.errors import CheckpointError


class Window(NamedTuple):
    """Samples of a stage that the run leaves out, [first, stop): a rewind has found them harmful."""

    stage: str
    first: int
    stop: int


class StepPlan(NamedTuple):
    """What a step trains on."""

    stage: str
    samples: range
    """Of the stage; the global batch."""


@dataclass(frozen=True, kw_only=True)
class Counters:
    """State between two steps. All counts are global, over all ranks."""

    data: str
    """Fingerprint of the data order (`Loader.fingerprint`); a resumed run must have the same."""
    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on, over all stages."""
    stage: str = ""
    """Stage of the next step."""
    stage_tokens: int = 0
    """Tokens of that stage done."""
    stage_samples: int = 0
    """Sequences of that stage done: the index of the next one."""
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    """Tokens trained on, by source."""
    watch: dict[str, Any] = field(default_factory=dict)
    """What detectors and policy remember (`Watch.state`); JSON-able."""

    def after_step(self, samples: range, seq_len: int, by_source: Mapping[str, int]) -> "Counters":
        """The counters after one more step, on these samples of the stage."""
        totals = dict(self.tokens_by_source)
        for name, tokens in by_source.items():
            totals[name] = totals.get(name, 0) + tokens
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + len(samples) * seq_len,
            stage_tokens=self.stage_tokens + len(samples) * seq_len,
            stage_samples=samples.stop,
            tokens_by_source=totals,
        )

    def enter_stage(self, name: str) -> "Counters":
        """The counters at the first step of another stage."""
        return replace(self, stage=name, stage_tokens=0, stage_samples=0)

    def to_dict(self) -> dict:
        """As JSON-able values."""
        return asdict(self)


def counters_from_dict(values: Mapping[str, Any]) -> Counters:
    """Strict inverse of `Counters.to_dict`. Raises `CheckpointError` naming what is missing or unknown."""
    found: dict[str, Any] = {"watch": {}, **values}  # those from before there was monitoring have none
    known = set(Counters.__dataclass_fields__)
    if set(found) != known:
        missing, extra = sorted(known - set(found)), sorted(set(found) - known)
        raise CheckpointError(f"counters of the checkpoint do not fit: missing {missing}, unknown {extra}")
    return Counters(**found)


def coming_steps(
    stages: Mapping[str, StageConfig], counters: Counters, windows: Sequence[Window]
) -> Iterator[tuple[StepPlan, Counters]]:
    """Every step from `counters` to the end of the run, with the counters before it (tokens by source are not kept up)."""
    names = list(stages)
    for name in names[names.index(counters.stage) if counters.stage else 0 :]:
        stage = stages[name]
        if counters.stage != name:
            counters = counters.enter_stage(name)
        while counters.stage_tokens < stage.tokens:
            rows = batch_size_at(stage, counters.stage_tokens)
            first = _next_clear(name, counters.stage_samples, rows, windows)
            samples = range(first, first + rows)
            yield StepPlan(name, samples), counters
            counters = counters.after_step(samples, stage.seq_len, {})


def _next_clear(stage: str, first: int, rows: int, windows: Sequence[Window]) -> int:
    """The first sample, from `first` on, whose `rows` samples touch no window."""
    for window in sorted(window for window in windows if window.stage == stage):
        if window.first < first + rows and first < window.stop:
            first = window.stop
    return first


def samples_of_steps(
    stages: Mapping[str, StageConfig], start: Counters, windows: Sequence[Window], steps: range
) -> list[Window]:
    """What a run that goes on from `start` reads in these steps, neighbouring samples as one window."""
    found: list[Window] = []
    for plan, counters in coming_steps(stages, start, windows):
        if counters.step + 1 >= steps.stop:
            break
        if counters.step + 1 in steps:
            window = Window(plan.stage, plan.samples.start, plan.samples.stop)
            if found and found[-1].stage == window.stage and found[-1].stop == window.first:
                window = found.pop()._replace(stop=window.stop)
            found.append(window)
    return found
