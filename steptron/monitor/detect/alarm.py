"""The interface of detectors: the run's surroundings, the statistics of a step, and their alarms."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from steptron.monitor.statistics.reduction import derived
from steptron.monitor.statistics.registry import Registry

Phase = Literal["raised", "lasting", "cleared"]
"""`raised`: this step raised the alarm. `lasting`: it was raised before, and this step is bad again.

`cleared`: it is over.
"""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The constants of a process that determine the meaning of the vital statistics."""

    layers: tuple[int, ...]
    """The global indices of the MoE layers."""
    num_experts: int
    """The number of routed experts per layer."""
    top_k: int
    """The number of experts that a token chooses."""
    ep: int
    """The number of expert-parallel ranks. Each holds a block of neighbouring experts."""
    world_size: int
    """The number of ranks."""
    level: str
    """The value of `monitor.level`."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A detector's message that something is wrong at a step, or no longer is."""

    detector: str
    """The recipe's key."""
    phase: Phase
    """The phase: the alarm begins, lasts or is over."""
    step: int
    """The step that was judged."""
    since: int
    """The first bad step."""
    count: int
    """The number of bad steps so far."""
    where: dict[str, int | str]
    """The place: layer, expert, rank, side, …; `more` is the number of other bad cells, of which this is the worst."""
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
        """Return whether this step raised the alarm."""
        return self.phase == "raised"

    def evidence(self) -> dict[str, Any]:
        """Return the evidence for the ledger, whose event has the step by itself."""
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
    """The statistics of one step for the detectors."""

    step: int
    """The step number."""
    new_stage: bool
    """True for the first step of its stage that is judged."""
    registry: Registry
    """The meaning of the plane's slots."""
    plane: np.ndarray
    """The vital plane, float32."""
    _known: dict[str, np.ndarray] = field(default_factory=dict)

    def values(self, name: str) -> np.ndarray:
        """Return a statistic, plain or derived, shaped like its grid, float64; it must not be changed.

        A derived one is NaN where it would divide by 0.
        """
        if name not in self._known:
            if name in self.registry.derived:
                self._known[name] = derived(self.registry.derived[name].powers, self.values)
            else:
                self._known[name] = self.registry.view(self.plane, name).astype(np.float64)
        return self._known[name]

    def value(self, name: str) -> float:
        """Return a statistic without axes."""
        return float(self.registry.view(self.plane, name))
