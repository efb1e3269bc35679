"""The interface of detectors: the run's surroundings, the statistics of a step, and their alarms."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from steptron.monitor.registry import Registry

Phase = Literal["raised", "lasting", "cleared"]
"""`raised`: this step made it an alarm · `lasting`: raised before, and this step is bad again · `cleared`: it is
over."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The constants of a process's life that the meaning of the vital statistics depends on."""

    layers: tuple[int, ...]
    """Global indices of the MoE layers."""
    num_experts: int
    """Routed experts a layer."""
    top_k: int
    """Experts a token chooses."""
    ep: int
    """Expert-parallel ranks; each holds a block of neighbouring experts."""
    world_size: int
    """Ranks."""
    level: str
    """`monitor.level`."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Something is wrong at a step, or no longer is."""

    detector: str
    """The recipe's key."""
    phase: Phase
    """The phase: the alarm begins, lasts or is over."""
    step: int
    """The step that was judged."""
    since: int
    """First bad step."""
    count: int
    """Bad steps so far."""
    where: dict[str, int | str]
    """The place: layer, expert, rank, side, …; `more`: the number of others beside it, of which it is the worst."""
    value: float
    """The measured value."""
    threshold: float
    """The threshold that it crossed."""
    unit: str
    """The unit of both."""
    text: str
    """A sentence for a person."""

    @property
    def new(self) -> bool:
        """Raised by this step."""
        return self.phase == "raised"

    def evidence(self) -> dict[str, Any]:
        """For the ledger, whose event has the step by itself."""
        return {
            "detector": self.detector,
            "since": self.since,
            "count": self.count,
            "where": dict(self.where),
            "value": self.value,
            "threshold": self.threshold,
            "unit": self.unit,
            "text": self.text,
        }


@dataclass(frozen=True, kw_only=True)
class Now:
    """One step as detectors see it."""

    step: int
    """Its number."""
    new_stage: bool
    """It is the first of its stage that is seen."""
    registry: Registry
    """The meaning of the plane's slots."""
    plane: np.ndarray
    """The vital plane, float32."""
    _known: dict[str, np.ndarray] = field(default_factory=dict)

    def values(self, name: str) -> np.ndarray:
        """A statistic, shaped as its grid, float64; not to be changed."""
        if name not in self._known:
            self._known[name] = self.registry.view(self.plane, name).astype(np.float64)
        return self._known[name]

    def value(self, name: str) -> float:
        """A statistic without axes."""
        return float(self.registry.view(self.plane, name))
