"""The common part of all detectors: cells are read, judged with hysteresis, and combined to a few alarms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from steptron.monitor.detect.alarm import Alarm, Now, Phase
from steptron.monitor.detect.hysteresis import Hysteresis, pack, unpack


@dataclass(frozen=True, kw_only=True)
class AlarmCell:
    """A cell's part of an alarm."""

    where: dict[str, int | str]
    value: float
    threshold: float
    unit: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A step as one detector judges it, by cell."""

    bad: np.ndarray
    """The cells beyond the threshold, bool [cells]."""
    clean: np.ndarray
    """The cells within the threshold for clearing, bool [cells]."""
    known: np.ndarray | None = None
    """The cells that could be judged, bool [cells]. None means all."""
    severity: np.ndarray
    """Severity by cell, float64 [cells], larger is worse; an alarm names the most severe cells."""
    tell: Callable[[int], AlarmCell]
    """A function that returns the finding of a cell."""
    at_once: bool = False
    """True if one clean step clears the alarm."""


class Detector:
    """The base class of detectors. Subclasses define what they read."""

    name: str
    """The recipe's key."""
    needs: tuple[str, ...]
    """The statistics without which it is not active."""
    kept: tuple[str, ...] = ()
    """The attributes with its state besides the hysteresis: arrays of fixed shape, or lists of numbers."""

    def __init__(self, *, cells: int, group: int, steps: int, clear_steps: int):
        """Start with an empty state.

        Args:
            cells: number of things that are judged separately: experts of all layers, layers, ranks.
            group: number of neighbouring cells that share an alarm, which names the most severe ones.
            steps: consecutive bad steps that raise an alarm.
            clear_steps: consecutive clean steps that clear it.
        """
        self._group = group
        self.latch = Hysteresis(cells, steps, clear_steps)

    def read(self, now: Now) -> Reading | None:
        """Judge a step. None means that there is nothing to judge."""
        raise NotImplementedError

    def observe(self, now: Now) -> list[Alarm]:
        """Return the alarms that the step raises, repeats or clears."""
        reading = self.read(now)
        if reading is None:
            return []
        change = self.latch.update(now.step, reading.bad, reading.clean, reading.known, reading.at_once)
        alarms = self._alarms(now.step, "raised", _groups(change.raised, self._group), reading)
        alarms += self._alarms(now.step, "lasting", _groups(change.lasting, self._group), reading)
        alarms += self._alarms(now.step, "cleared", _groups(change.cleared, self._group), reading)
        self.latch.forget(change.cleared)
        return alarms

    def _alarms(self, step: int, phase: Phase, groups: list[np.ndarray], reading: Reading) -> list[Alarm]:
        """Return one alarm per group of cells."""
        alarms = []
        for members in groups:
            worst = int(members[np.argmax(reading.severity[members])])
            finding = reading.tell(worst)
            count, where, text = int(self.latch.count[members].max()), finding.where, finding.text
            if len(members) > 1:
                where = {**where, "more": len(members) - 1}
                text = f"{text}, and {len(members) - 1} more"
            if phase == "cleared":
                text = f"over after {count} bad {'step' if count == 1 else 'steps'}: {text}"
            alarms.append(
                Alarm(
                    detector=self.name,
                    phase=phase,
                    step=step,
                    since=int(self.latch.since[members].min()),
                    count=count,
                    where=where,
                    value=finding.value,
                    threshold=finding.threshold,
                    unit=finding.unit,
                    text=text,
                )
            )
        return alarms

    def state(self) -> dict[str, Any]:
        """Return the state as JSON-able values."""
        kept = {name: getattr(self, name) for name in self.kept}
        return {
            "latch": self.latch.state(),
            **{name: pack(value) if isinstance(value, np.ndarray) else list(value) for name, value in kept.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the result of `state`.

        State of other cells or windows (another number of ranks, a changed recipe) is discarded.
        """
        self.latch.restore(state["latch"])
        for name in (name for name in self.kept if name in state):
            own, value = getattr(self, name), state[name]
            setattr(self, name, unpack(value, own) if isinstance(own, np.ndarray) else list(value))


def _groups(cells: np.ndarray, size: int) -> list[np.ndarray]:
    """Split sorted cells into groups."""
    if not len(cells):
        return []
    starts = np.flatnonzero(np.diff(cells // size, prepend=-1))
    return np.split(cells, starts[1:])
