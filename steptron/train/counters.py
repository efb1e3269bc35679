"""The contents of a checkpoint besides tensors: step, stage, tokens, data fingerprint, state of the detectors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from steptron.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Counters:
    """The state of a run between two steps, as a checkpoint keeps it. All counts are over all ranks."""

    data: str
    """The fingerprint of the data order (`Loader.fingerprint`). A resumed run must have the same."""
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
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    """The tokens trained on, by source."""
    guard: dict[str, Any] = field(default_factory=dict)
    """The state of detectors and policy (`Guard.state`), as JSON-able values."""

    def after_step(self, samples: range, seq_len: int, by_source: Mapping[str, int]) -> "Counters":
        """Return the counters after one more step, on these samples of the stage."""
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
        """Return the counters at the first step of another stage."""
        return replace(self, stage=name, stage_tokens=0, stage_samples=0)

    def to_dict(self) -> dict:
        """Return the counters as JSON-able values."""
        return asdict(self)


def counters_from_dict(values: Mapping[str, Any]) -> Counters:
    """Return the counters that `Counters.to_dict` wrote. Raises `CheckpointError` if one is missing or unknown."""
    known = set(Counters.__dataclass_fields__)
    if set(values) != known:
        missing, extra = sorted(known - set(values)), sorted(set(values) - known)
        raise CheckpointError(f"counters of the checkpoint do not fit: missing {missing}, unknown {extra}")
    return Counters(**values)
