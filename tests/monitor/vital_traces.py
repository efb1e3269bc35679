"""Vital planes of made-up runs: noise as small real runs have it, and faults planted into it.

    for step, stage, plane in Trace(seed=1).steps(300, fault=...): ...

A fault is a function (step, values) that changes the values by name, [layer, expert], [layer], [rank] or a scalar, in
place."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from steptron.monitor.detect import Alarm, Detectors, Surroundings
from steptron.monitor.statistics.reduced_stats import register_vitals
from steptron.monitor.statistics.registry import Registry

Values = dict[str, Any]
Fault = Callable[[int, Values], None]


class Trace:
    """A run of tiny batches: 32 tokens an expert and step."""

    def __init__(
        self,
        seed: int = 0,
        layers: tuple[int, ...] = (1, 2, 3),
        num_experts: int = 16,
        top_k: int = 2,
        world_size: int = 4,
        ep: int = 2,
        level: str = "light",
        stages: tuple[tuple[str, int], ...] = (("base", 1200), ("long", 10**9)),
        jitter: float = 0.2,
    ):
        """`stages`: name and last step of each; `jitter`: standard deviation of log step times, half of it by rank."""
        self.around = Surroundings(
            layers=layers if level != "off" else (),
            num_experts=num_experts,
            top_k=top_k,
            ep=ep,
            world_size=world_size,
            level=level,
        )
        self.registry = Registry()
        register_vitals(self.registry, self.around.layers, num_experts, world_size)
        self._random = np.random.default_rng(seed)
        self._stages = stages
        self._jitter = jitter
        shape = (len(layers), num_experts)
        self._skew_LE = self._random.normal(0, 0.8, shape)
        self._scale_LE = np.exp(self._random.normal(0, 0.35, shape))
        self._shape = shape

    def steps(self, last: int, fault: Fault | None = None, first: int = 1) -> Iterator[tuple[int, str, np.ndarray]]:
        """Step, stage and plane, from 1 on; those before `first` are drawn, too, but not given."""
        for step in range(1, last + 1):
            values = self.values(step)
            if fault is not None:
                fault(step, values)
            if step >= first:
                yield step, self.stage(step), self.plane(values)

    def stage(self, step: int) -> str:
        """Name of the step's stage."""
        return next(name for name, last in self._stages if step <= last)

    def plane(self, values: Values) -> np.ndarray:
        """The vital plane that holds these values."""
        plane = self.registry.new_plane()
        for name in self.registry.statistics:
            self.registry.view(plane, name)[...] = values[name]
        return plane

    def values(self, step: int) -> Values:
        """A healthy step."""
        random, around = self._random, self.around
        number = [name for name, _ in self._stages].index(self.stage(step))
        begin = ([0] + [last for _, last in self._stages])[number]
        settle = 0.6 * math.exp(-(step - begin) / 30) if number else 0.0
        loss = 2.5 + 5.8 * math.exp(-step / 60) - 0.4 * number + settle + random.normal(0, 0.09)
        norm = (0.4 + 4.0 * math.exp(-step / 40)) * math.exp(random.normal(0, 0.25)) * (1 + 0.5 * settle)
        if random.random() < 0.01:
            norm *= random.uniform(1.5, 3.0)
        ranks = around.world_size
        common = 0.12 * math.exp(random.normal(0, self._jitter)) * (1 + number)
        busy_R = common * np.exp(random.normal(0, self._jitter / 2, ranks))
        values: Values = {
            "loss": loss,
            "total_loss": loss + 0.3,
            "grad_norm": norm,
            "step_time": np.full(ranks, busy_R.max() + 0.02) if step > 1 else np.zeros(ranks),
            "communication_time": busy_R.max() + 0.02 - busy_R if step > 1 else np.zeros(ranks),
            "data_wait": random.exponential(0.002, ranks) + (0.5 if step == begin + 1 else 0.0),
            "not_finite": np.zeros(ranks),
        }
        return values | (self._moe(step) if around.layers else {})

    def _moe(self, step: int) -> Values:
        random, around = self._random, self.around
        num_layers, num_experts = self._shape
        tokens = 32 * num_experts
        skew_LE = self._skew_LE * (0.25 + 1.2 * math.exp(-step / 80)) + random.normal(0, 0.1, self._shape)
        shares_LE = np.exp(skew_LE)
        shares_LE /= shares_LE.sum(axis=1, keepdims=True)
        tokens_LE = np.stack([random.multinomial(tokens, shares_E) for shares_E in shares_LE]).astype(float)
        spread_LE = self._scale_LE ** min(1.0, step / 150)
        # The mean over n tokens of something heavy-tailed.
        noise_LE = np.exp(random.normal(0, 1, self._shape) * 0.8 / np.sqrt(np.maximum(tokens_LE, 1)))
        elements_LE = tokens_LE * 96
        return {
            "router_tokens": np.full(num_layers, tokens / around.top_k),
            "confidence_sum": np.full(num_layers, 0.4 * tokens / around.top_k),
            "entropy_sum": tokens / around.top_k * math.log(num_experts) * random.uniform(0.5, 0.9, num_layers),
            "margin_sum": np.full(num_layers, 0.01 * tokens),
            "tokens": tokens_LE,
            "rows": tokens_LE.copy(),
            "elements": elements_LE,
            "h_square_sum": elements_LE * (0.3 * spread_LE * noise_LE) ** 2,
            "out_norm_sum": tokens_LE * 1.7 * spread_LE * noise_LE,
            "weight_square_sum": (3.0 * self._scale_LE**0.3) ** 2,
        }


def alarms(trace: Trace, detectors: Detectors, last: int, fault: Fault | None = None) -> list[Alarm]:
    """All alarms of `last` steps."""
    found = []
    for step, stage, plane in trace.steps(last, fault):
        found += detectors.observe(step, stage, trace.registry, plane)
    return found
