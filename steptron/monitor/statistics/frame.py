"""The numbers of one step, as the collector passes them to every sink."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Scalar = float | int | str | None


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Everything that a sink receives about one step."""

    step: int
    """The step number, from 1."""
    metrics: Mapping[str, Scalar]
    """The scalars by name, `step` and `stage` among them."""
    tokens_by_source: Mapping[str, int]
    """The tokens of this step's batch, by data source."""
    plane: np.ndarray | None
    """The values of this rank's statistics, float32 [slots] (see `registry`). None if none are stored, or they were
    dropped."""
    whole: np.ndarray | None = None
    """The combined statistics of all ranks, on rank 0 (see `gather`).

    If rank 0 has all statistics, it is the same array as `plane`.
    """


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A message that people must see at once."""

    step: int
    """The step that raised it."""
    title: str
    """A few words."""
    text: str
    """One sentence: what, where, how much, and the action."""
    severe: bool
    """True if training was changed or stopped because of it."""


class Sink(Protocol):
    """A destination of frames. Methods may raise OSError; the collector then continues without it (see `collector`)."""

    def write(self, frame: Frame) -> None:
        """Take one step."""
        ...

    def alert(self, alert: Alert) -> None:
        """Send a message to people; do nothing if the destination cannot."""
        ...

    def flush(self) -> None:
        """Put everything taken so far on disk."""
        ...

    def truncate_after(self, step: int) -> None:
        """Drop the steps after `step`, from which a resumed run continues."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...
