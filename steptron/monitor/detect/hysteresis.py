"""Hysteresis for many cells at once, and arrays as short text for checkpoints."""

import base64
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Change:
    """The cells that a step changes, by kind of change."""

    raised: np.ndarray
    lasting: np.ndarray
    cleared: np.ndarray


class Hysteresis:
    """A switch with hysteresis: up after `steps` bad steps in a row, down after `clear_steps` clean ones in a row.

    Otherwise it stays as it is.
    """

    def __init__(self, cells: int, steps: int, clear_steps: int):
        self._steps = steps
        self._clear_steps = clear_steps
        self.up = np.zeros(cells, dtype=bool)
        """True where the alarm is raised."""
        self.since = np.zeros(cells, dtype=np.int64)
        """The first bad step."""
        self.count = np.zeros(cells, dtype=np.int64)
        """The number of bad steps since then."""
        self._clean = np.zeros(cells, dtype=np.int64)  # consecutive clean steps of a cell whose alarm is raised

    def update(
        self, step: int, bad: np.ndarray, clean: np.ndarray, known: np.ndarray | None = None, at_once: bool = False
    ) -> Change:
        """Take a step.

        Args:
            step: the number of the step.
            bad: cells beyond the threshold [cells].
            clean: cells within the threshold for clearing [cells].
            known: cells that could be judged; the others keep their state. None: all.
            at_once: one clean step is enough.
        """
        if not bad.any() and not self.count.any():
            nothing = np.empty(0, dtype=np.int64)
            return Change(raised=nothing, lasting=nothing, cleared=nothing)
        if known is not None:
            bad, clean = bad & known, clean & known
        waiting = ~self.up & (self.count > 0)
        fine = waiting & ~bad if known is None else waiting & ~bad & known
        self.count[fine] = 0
        self.since[bad & (self.count == 0)] = step
        self.count[bad] += 1
        lasting = self.up & bad
        raised = ~self.up & (self.count >= self._steps) & bad
        self.up |= raised
        seen = self.up if known is None else self.up & known
        self._clean[seen & ~clean] = 0
        self._clean[seen & clean] += 1
        cleared = seen & clean & (self._clean >= (1 if at_once else self._clear_steps))
        self.up &= ~cleared
        return Change(raised=np.flatnonzero(raised), lasting=np.flatnonzero(lasting), cleared=np.flatnonzero(cleared))

    def forget(self, cells: np.ndarray) -> None:
        """Reset the counts of cleared cells after they were read."""
        self.count[cells] = 0
        self._clean[cells] = 0

    def state(self) -> dict[str, Any]:
        """Return the state as JSON-able values."""
        return {"up": pack(self.up), "since": pack(self.since), "count": pack(self.count), "clean": pack(self._clean)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a `state`."""
        self.up = unpack(state["up"], self.up)
        self.since = unpack(state["since"], self.since)
        self.count = unpack(state["count"], self.count)
        self._clean = unpack(state["clean"], self._clean)


def pack(array: np.ndarray) -> str:
    """Return an array as text, `4x16:…`; compressed, because most states are zeros or alike."""
    content = base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 6)).decode()
    return f"{_shape(array)}:{content}"


def unpack(text: str, like: np.ndarray) -> np.ndarray:
    """Return the inverse of `pack`, with the type of `like`; return `like` itself if the shape differs."""
    shape, content = text.split(":")
    if shape != _shape(like):
        return like
    return np.frombuffer(zlib.decompress(base64.b64decode(content)), dtype=like.dtype).reshape(like.shape).copy()


def _shape(array: np.ndarray) -> str:
    return "x".join(map(str, array.shape))
