"""The contents of a checkpoint besides tensors: step, stage, tokens, facts about the data, state of the detectors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from steptron.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Counters:
    """The state of a run between two steps, as a checkpoint keeps it. All counts are over all ranks."""

    step: int = 0
    """The number of optimizer steps done."""
    tokens: int = 0
    """The tokens trained on, over all stages."""
    stage: str = ""
    """The stage of the next step, or of the last one at the end of a stage. Empty before the first step."""
    stage_tokens: int = 0
    """The tokens of that stage done."""
    stage_samples: int = 0
    """The index of the next sample of that stage."""
    sources: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    """The data trained on, by stage and source: `tokens` are input tokens, padding included; `unmasked` are those whose
    next token was a target; `epoch` is the number of input tokens of one epoch of the source in this stage."""
    drawn: dict[str, Any] = field(default_factory=dict)
    """The facts that decide the samples of the stages that have begun (`Loader.facts`). A resumed run must have the
    same. Empty before the first step."""
    mtp_heads: int = 0
    """The number of MTP heads that are trained. 0 before the first step, and in checkpoints of older versions, which
    trained all."""
    guard: dict[str, Any] = field(default_factory=dict)
    """The state of detectors and policy (`Guard.state`), as JSON-able values."""

    @property
    def tokens_by_source(self) -> dict[str, int]:
        """Return the tokens trained on, by source."""
        return totals_by_source(self.sources)

    @property
    def samples_by_stage(self) -> dict[str, int]:
        """Return the number of samples read in each stage that has begun. Those that the run left out count in the
        present stage only."""
        read = {
            name: sum(spent["tokens"] for spent in self.sources.get(name, {}).values()) // facts["seq_len"]
            for name, facts in self.drawn.get("stages", {}).items()
        }
        return read | {self.stage: self.stage_samples}

    def after_step(
        self,
        samples: range,
        seq_len: int,
        by_source: Mapping[str, int],
        unmasked: Mapping[str, int],
        epoch_tokens: Mapping[str, int],
    ) -> "Counters":
        """Return the counters after one more step, on these samples of the stage.

        Args:
            by_source: the input tokens of the step by source.
            unmasked: those of them whose next token was a target.
            epoch_tokens: the input tokens of one epoch of each source in this stage.
        """
        stage = dict(self.sources.get(self.stage, {}))
        for name, tokens in by_source.items():
            before = stage.get(name, {"tokens": 0, "unmasked": 0})
            stage[name] = {
                "tokens": before["tokens"] + tokens,
                "unmasked": before["unmasked"] + unmasked[name],
                "epoch": epoch_tokens[name],
            }
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + len(samples) * seq_len,
            stage_tokens=self.stage_tokens + len(samples) * seq_len,
            stage_samples=samples.stop,
            sources=self.sources | {self.stage: stage},
        )

    def enter_stage(self, name: str, drawn: dict[str, Any]) -> "Counters":
        """Return the counters at the first step of another stage. `drawn`: the facts about the data up to it."""
        return replace(self, stage=name, stage_tokens=0, stage_samples=0, drawn=drawn)

    def to_dict(self) -> dict:
        """Return the counters as JSON-able values."""
        return asdict(self)


def totals_by_source(sources: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, int]:
    """Return the tokens of each source over all stages. `sources`: see `Counters`."""
    totals: dict[str, int] = {}
    for stage in sources.values():
        for name, spent in stage.items():
            totals[name] = totals.get(name, 0) + spent["tokens"]
    return totals


def counters_from_dict(values: Mapping[str, Any]) -> Counters:
    """Return the counters that `Counters.to_dict` wrote. Raises `CheckpointError` if one is missing or unknown."""
    known, values = set(Counters.__dataclass_fields__), {"mtp_heads": 0, **values}
    if set(values) != known:
        missing, extra = sorted(known - set(values)), sorted(set(values) - known)
        raise CheckpointError(f"counters of the checkpoint do not fit: missing {missing}, unknown {extra}")
    return Counters(**values)
