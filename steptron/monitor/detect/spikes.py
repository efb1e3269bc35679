"""Detectors of the run's scalars: spikes of loss and gradient norm, and values that are not finite."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steptron.config.detectors import GradNormSpikeConfig, LossSpikeConfig, NotFiniteConfig
from steptron.monitor.detect.alarm import Now, Surroundings
from steptron.monitor.detect.base import AlarmCell, Detector, Reading

_MAD_TO_SIGMA = 1.4826
"""The standard deviation divided by the median absolute deviation of a normal distribution."""

_TAIL = 0.02
_TAIL_TO_SIGMA = 2.054
"""The distance of a normal distribution's 2nd and 98th percentile from its median, in standard deviations."""


@dataclass(frozen=True, kw_only=True)
class Usual:
    """The usual change of a series from step to step."""

    median: float
    """The median of the changes: the trend."""
    spread_down: float
    """The robust standard deviation downwards."""
    spread_up: float
    """The robust standard deviation upwards.

    Batches of few sources make two-humped losses, of which the MAD alone sees one hump. So the tail counts too.
    """


def usual(changes: Sequence[float]) -> Usual:
    """Return median and spreads of changes."""
    ordered = sorted(changes)
    median = middle(ordered)
    mad = middle(sorted([abs(change - median) for change in changes]))
    tail = int(_TAIL * (len(ordered) - 1))
    return Usual(
        median=median,
        spread_down=max(_MAD_TO_SIGMA * mad, (median - ordered[tail]) / _TAIL_TO_SIGMA),
        spread_up=max(_MAD_TO_SIGMA * mad, (ordered[-1 - tail] - median) / _TAIL_TO_SIGMA),
    )


def middle(ordered: Sequence[float]) -> float:
    """Return the median of sorted numbers."""
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


class Spike(Detector):
    """Detects a spike: a scalar's change from the median of its last few steps, against earlier changes in a window.

    A trend is therefore not a spike. Spikes are kept out of both medians until they are over, or have lasted so long
    that they are the new normal.
    """

    title: str
    """The name of the value in messages."""
    unit: str
    """The unit of the value, as text behind it."""
    kept = ("changes", "recent", "held")

    def __init__(self, config: LossSpikeConfig | GradNormSpikeConfig, around: Surroundings):
        super().__init__(cells=1, group=1, steps=config.raise_after_steps, clear_steps=config.clear_steps)
        self._config = config
        self.changes: list[float] = []
        self.recent: list[float] = []
        self.held: list[float] = []

    def change(self, value: float, base: float) -> float:
        """Return the change from the level before to a step's value."""
        raise NotImplementedError

    def changed(self, base: float, change: float) -> float:
        """Return the value for a change: the inverse of `change`."""
        raise NotImplementedError

    def limits(self, by: Usual) -> tuple[float, float]:
        """Return two limits: a change below the first or above the second is a spike."""
        raise NotImplementedError

    def read(self, now: Now) -> Reading | None:
        value, config = now.value(self.needs[0]), self._config
        if now.new_stage:
            self.changes, self.recent, self.held = [], [], []
        if len(self.changes) < config.warm_up:
            if math.isfinite(value):
                self._take(value)
            return self._new_stage(value) if now.new_stage else None
        if not math.isfinite(value):
            return None
        reading = self._judge(value)
        if reading.bad[0] or (self.latch.up[0] and not reading.clean[0]):
            self.held.append(value)
            if len(self.held) >= config.rebase_after_steps:
                self.recent, self.held = self.held[-config.recent :], []
        else:
            self.held = []
            self._take(value)
        return reading

    def _take(self, value: float) -> None:
        """Take a normal step."""
        if 3 * len(self.recent) >= self._config.recent:
            self.changes.append(self.change(value, middle(sorted(self.recent))))
            del self.changes[: -self._config.window]
        self.recent.append(value)
        del self.recent[: -self._config.recent]

    def _judge(self, value: float) -> Reading:
        ordered, by, clear = sorted(self.recent), usual(self.changes), self._config.clear_ratio
        base = middle(ordered)
        change = self.change(value, base)
        down, up = self.limits(by)
        clear_down, clear_up = (by.median + clear * (limit - by.median) for limit in (down, up))
        # A value close to one of the last steps is not a spike either: if losses have two humps, the median may be in
        # the rarer one.
        like = self.change(value, min(max(value, ordered[0]), ordered[-1]))
        clean = clear_down <= like <= clear_up

        def tell(_: int) -> AlarmCell:
            side, limit = ("up", up) if change >= by.median else ("down", down)
            threshold = self.changed(base, limit)
            text = f"{self.title} {value:.4g}{self.unit} after {base:.4g}; the limit is {threshold:.4g}"
            return self._finding(side, value, threshold, text)

        return Reading(
            bad=np.array([not (clean or down <= change <= up)]),
            clean=np.array([clean]),
            severity=np.zeros(1),
            tell=tell,
        )

    def _new_stage(self, value: float) -> Reading:
        """Clear a raised alarm, because there is nothing left to compare with."""
        text = f"{self.title} {value:.4g}{self.unit} at the start of a stage"
        return Reading(
            bad=np.zeros(1, dtype=bool),
            clean=np.ones(1, dtype=bool),
            severity=np.zeros(1),
            tell=lambda _: self._finding("none", value, value, text),
            at_once=True,
        )

    def _finding(self, side: str, value: float, threshold: float, text: str) -> AlarmCell:
        return AlarmCell(
            where={"side": side}, value=value, threshold=threshold, unit=self.unit.strip() or "1", text=text
        )


class LossSpike(Spike):
    """See `LossSpikeConfig`. Changes are differences."""

    name = "loss_spike"
    needs = ("loss",)
    title = "loss"
    unit = " nats"

    def __init__(self, config: LossSpikeConfig, around: Surroundings):
        super().__init__(config, around)
        self._thresholds = config

    def change(self, value: float, base: float) -> float:
        return value - base

    def changed(self, base: float, change: float) -> float:
        return base + change

    def limits(self, by: Usual) -> tuple[float, float]:
        of = self._thresholds
        return (
            min(by.median - of.threshold_down * by.spread_down, -of.min_down),
            max(by.median + of.threshold_up * by.spread_up, of.min_up),
        )


class GradNormSpike(Spike):
    """See `GradNormSpikeConfig`. Changes are factors."""

    name = "grad_norm_spike"
    needs = ("grad_norm",)
    title = "gradient norm"
    unit = ""

    def __init__(self, config: GradNormSpikeConfig, around: Surroundings):
        super().__init__(config, around)
        self._thresholds = config

    def change(self, value: float, base: float) -> float:
        return value / base if base > 0 else 1.0

    def changed(self, base: float, change: float) -> float:
        return base * change

    def limits(self, by: Usual) -> tuple[float, float]:
        of = self._thresholds
        return (
            min(by.median - of.threshold_down * by.spread_down, 1 / of.factor_down),
            max(by.median + of.threshold_up * by.spread_up, of.factor_up),
        )


_SCALARS = {"loss": "loss", "total_loss": "total loss", "grad_norm": "gradient norm"}
"""Scalars that are to be finite, by name. The total loss has every term in it."""


class NotFinite(Detector):
    """See `NotFiniteConfig`. Names the rank with the most gradients that are not finite.

    They are looked at after they are summed over ranks and sharded: the rank is the one that holds them, not the one
    that made them.
    """

    name = "not_finite"
    needs = ("loss", "total_loss", "grad_norm", "not_finite")

    def __init__(self, config: NotFiniteConfig, around: Surroundings):
        super().__init__(cells=1, group=1, steps=1, clear_steps=config.clear_steps)

    def read(self, now: Now) -> Reading:
        gradients_R = np.nan_to_num(now.values("not_finite"), nan=0.0)
        scalars = [name for name in _SCALARS if not math.isfinite(now.value(name))]
        ranks = np.flatnonzero(gradients_R)
        bad = bool(scalars) or len(ranks) > 0

        def tell(_: int) -> AlarmCell:
            where: dict[str, int | str] = {}
            parts = [f"the {_SCALARS[name]} is {now.value(name)}" for name in scalars]
            value = 0.0
            if len(ranks):
                rank = int(np.argmax(gradients_R))
                value = float(gradients_R[rank])
                where = {"rank": rank}
                parts.append(
                    f"of the parameters that rank {rank} holds, the gradients of {value:g} are NaN or infinite"
                )
            if len(ranks) > 1:
                where["more"] = len(ranks) - 1
            if scalars:
                where["of"] = " ".join(scalars)
            text = ", ".join(parts) or "all is finite"
            return AlarmCell(where=where, value=value, threshold=0.0, unit="gradients", text=text)

        return Reading(bad=np.array([bad]), clean=np.array([not bad]), severity=np.zeros(1), tell=tell)
