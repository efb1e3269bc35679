"""Detectors of the run's scalars: loss and gradient norm that jump, and what is not finite."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steptron.config.detectors import GradNormSpikeConfig, LossSpikeConfig, NotFiniteConfig
from steptron.monitor.detect.alarm import Now, Surroundings
from steptron.monitor.detect.watcher import Finding, Reading, Watcher

_MAD_TO_SIGMA = 1.4826
"""Standard deviation ÷ median absolute deviation of a normal distribution."""

_TAIL = 0.05
_TAIL_TO_SIGMA = 1.645
"""Distance of a normal distribution's 5th and 95th percentile from its median, in standard deviations."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """Where a series has been."""

    median: float
    """Of the window."""
    low: float
    """The lower of the window's median and that of the last steps."""
    high: float
    """The higher of them."""
    spread_down: float
    """Standard deviation downwards, robustly."""
    spread_up: float
    """And upwards: few sources of text make two-humped losses, whose MAD alone sees one hump."""


def level_of(window: Sequence[float], recent: int) -> Level:
    """Median and spreads of a window; `recent`: how many of its last values must agree that something is a jump."""
    ordered = sorted(window)
    median = _middle(ordered)
    mad = _middle(sorted(abs(value - median) for value in window))
    last = _middle(sorted(window[-recent:]))
    tail = int(_TAIL * (len(ordered) - 1))
    return Level(
        median=median,
        low=min(median, last),
        high=max(median, last),
        spread_down=max(_MAD_TO_SIGMA * mad, (median - ordered[tail]) / _TAIL_TO_SIGMA),
        spread_up=max(_MAD_TO_SIGMA * mad, (ordered[-1 - tail] - median) / _TAIL_TO_SIGMA),
    )


def _middle(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


class Spike(Watcher):
    """A scalar against the window of steps before.

    Spikes stay out of the window, held back until they are either over or have lasted so long that they are the new normal."""

    title: str
    """What its value is called."""
    unit: str
    """Of the value, as text behind it."""
    kept = ("window", "held")

    def __init__(self, config: LossSpikeConfig | GradNormSpikeConfig, around: Surroundings):
        super().__init__(cells=1, group=1, steps=config.steps, clear_steps=config.clear_steps)
        self._config = config
        self.window: list[float] = []
        self.held: list[float] = []

    def limits(self, level: Level) -> tuple[float, float]:
        """Below the first and above the second it is a spike."""
        raise NotImplementedError

    def read(self, now: Now) -> Reading | None:
        value, config = now.value(self.needs[0]), self._config
        if now.new_stage:
            self.window, self.held = [], []
        if len(self.window) < config.warm_up:
            if math.isfinite(value):
                self.window.append(value)
            return self._new_stage(value) if now.new_stage else None
        if not math.isfinite(value):
            return None
        reading = self._judge(value)
        if reading.bad[0] or (self.latch.up[0] and not reading.clean[0]):
            self.held.append(value)
            if len(self.held) >= config.new_normal:
                self.window, self.held = self.held[-config.window :], []
        else:
            self.window.append(value)
            self.held = []
            del self.window[: -config.window]
        return reading

    def _judge(self, value: float) -> Reading:
        steps = len(self.window)
        level = level_of(self.window, self._config.recent)
        down, up = self.limits(level)
        clear = self._config.clear
        clear_down = level.low - clear * (level.low - down)
        clear_up = level.high + clear * (up - level.high)

        def tell(_: int) -> Finding:
            side, limit = ("up", up) if value >= level.median else ("down", down)
            before = f"the median of {steps} steps before is {level.median:.4g}, the limit {limit:.4g}"
            text = f"{self.title} {value:.4g}{self.unit}; {before}"
            return self._finding(side, value, limit, text)

        return Reading(
            bad=np.array([value < down or value > up]),
            clean=np.array([clear_down <= value <= clear_up]),
            severity=np.zeros(1),
            tell=tell,
        )

    def _new_stage(self, value: float) -> Reading:
        """What was raised is over: there is nothing to compare with any more."""
        text = f"{self.title} {value:.4g}{self.unit} at the start of a stage"
        return Reading(
            bad=np.zeros(1, dtype=bool),
            clean=np.ones(1, dtype=bool),
            severity=np.zeros(1),
            tell=lambda _: self._finding("none", value, value, text),
            at_once=True,
        )

    def _finding(self, side: str, value: float, threshold: float, text: str) -> Finding:
        return Finding(where={"side": side}, value=value, threshold=threshold, unit=self.unit.strip() or "1", text=text)


class LossSpike(Spike):
    """See `LossSpikeConfig`."""

    name = "loss_spike"
    needs = ("loss",)
    title = "loss"
    unit = " nats"

    def __init__(self, config: LossSpikeConfig, around: Surroundings):
        super().__init__(config, around)
        self._thresholds = config

    def limits(self, level: Level) -> tuple[float, float]:
        by = self._thresholds
        return (
            level.low - max(by.down * level.spread_down, by.min_down),
            level.high + max(by.up * level.spread_up, by.min_up),
        )


class GradNormSpike(Spike):
    """See `GradNormSpikeConfig`."""

    name = "grad_norm_spike"
    needs = ("grad_norm",)
    title = "gradient norm"
    unit = ""

    def __init__(self, config: GradNormSpikeConfig, around: Surroundings):
        super().__init__(config, around)
        self._thresholds = config

    def limits(self, level: Level) -> tuple[float, float]:
        by = self._thresholds
        return (
            min(level.low - by.down * level.spread_down, level.low / by.factor_down),
            max(level.high + by.up * level.spread_up, level.high * by.factor_up),
        )


class NotFinite(Watcher):
    """See `NotFiniteConfig`. Names the rank with the most gradients that are not finite."""

    name = "not_finite"
    needs = ("loss", "grad_norm", "not_finite")

    def __init__(self, config: NotFiniteConfig, around: Surroundings):
        super().__init__(cells=1, group=1, steps=1, clear_steps=config.clear_steps)

    def read(self, now: Now) -> Reading:
        gradients_R = np.nan_to_num(now.values("not_finite"), nan=0.0)
        scalars = [name for name in ("loss", "grad_norm") if not math.isfinite(now.value(name))]
        ranks = np.flatnonzero(gradients_R)
        bad = bool(scalars) or len(ranks) > 0

        def tell(_: int) -> Finding:
            where: dict[str, int | str] = {}
            parts = [f"the {name.replace('grad_norm', 'gradient norm')} is {now.value(name)}" for name in scalars]
            value = 0.0
            if len(ranks):
                rank = int(np.argmax(gradients_R))
                value = float(gradients_R[rank])
                where = {"rank": rank}
                parts.append(f"rank {rank} has {value:g} gradients that are NaN or infinite")
            if len(ranks) > 1:
                where["more"] = len(ranks) - 1
            if scalars:
                where["of"] = " ".join(scalars)
            text = ", ".join(parts) or "all is finite"
            return Finding(where=where, value=value, threshold=0.0, unit="gradients", text=text)

        return Reading(bad=np.array([bad]), clean=np.array([not bad]), severity=np.zeros(1), tell=tell)
