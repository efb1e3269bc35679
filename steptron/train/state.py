"""Where a run is: counters, nothing else. Data order, learning rate and stage follow from them and the recipe."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from steptron.errors import CheckpointError


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

    def after_step(self, samples: int, seq_len: int, by_source: Mapping[str, int]) -> "Counters":
        """The counters after one more step of `samples` sequences."""
        totals = dict(self.tokens_by_source)
        for name, tokens in by_source.items():
            totals[name] = totals.get(name, 0) + tokens
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + samples * seq_len,
            stage_tokens=self.stage_tokens + samples * seq_len,
            stage_samples=self.stage_samples + samples,
            tokens_by_source=totals,
        )

    def enter_stage(self, name: str) -> "Counters":
        """The counters at the first step of another stage."""
        return replace(self, stage=name, stage_tokens=0, stage_samples=0)

    def to_dict(self) -> dict:
        """As JSON-able values."""
        return asdict(self)


def counters_from_dict(values: Mapping) -> Counters:
    """Strict inverse of `Counters.to_dict`. Raises `CheckpointError` naming what is missing or unknown."""
    known = set(Counters.__dataclass_fields__)
    if set(values) != known:
        missing, extra = sorted(known - set(values)), sorted(set(values) - known)
        raise CheckpointError(f"counters of the checkpoint do not fit: missing {missing}, unknown {extra}")
    return Counters(**values)
