"""One step's numbers, as the collector hands them to every sink."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Scalar = float | int | str | None


@dataclass(frozen=True, kw_only=True)
class Frame:
    """All that a sink is told about one step."""

    step: int
    """Step number, from 1."""
    metrics: Mapping[str, Scalar]
    """Scalars by name, `step` and `stage` among them."""
    tokens_by_source: Mapping[str, int]
    """Tokens of this step's batch, by data source."""
    plane: np.ndarray | None
    """Values of all registered statistics, float32 [slots] (see `registry`). None: nothing is registered."""


class Sink(Protocol):
    """A destination of frames. May raise OSError; the collector then goes on without it."""

    def write(self, frame: Frame) -> None:
        """Take one step."""
        ...

    def flush(self) -> None:
        """Put everything taken so far on disk."""
        ...

    def truncate_after(self, step: int) -> None:
        """Forget the steps after `step`, which is where a resumed run goes on from."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...
