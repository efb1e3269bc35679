"""The recipe's `monitor.detectors` and `monitor.policy`: thresholds with units, and what is done when one is crossed."""

from dataclasses import dataclass, field
from typing import Literal

Act = Literal["ignore", "warn", "skip", "clip", "rewind", "stop"]
"""`ignore`: nothing · `warn`: ledger, log and alert · `skip`: the step's update is left out · `clip`: activation limits are switched on
for the layer · `rewind`: back to a checkpoint, past the data that did it · `stop`: save, and end with exit code 3."""


@dataclass(frozen=True, kw_only=True)
class DetectorsConfig:
    """Thresholds, detector by detector."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What is done when a detector raises an alarm."""

    acts: dict[str, Act] = field(default_factory=dict)
    """Detector → act, for those that are to do something else than by default."""
    rewinds: int = 3
    """Rewinds a run may make; after them `rewind` means `stop`."""
    rewind_before: int = 1
    """Steps before the first bad one whose data is skipped too."""
    limit: float = 7.0
    """Activation limit that `clip` sets for the routed experts of the layer."""
