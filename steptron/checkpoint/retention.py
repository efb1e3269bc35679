"""The retention rules of checkpoints: the newest ones, one every N steps, those before decisions, and the best one."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The rules. A checkpoint stays if any of them holds."""

    newest: int
    """The number of newest checkpoints to keep."""
    every: int | None = None
    """The interval in steps: checkpoints of steps that are a multiple of it stay."""
    decisions: Callable[[], Iterable[int]] = tuple
    """The steps of decisions: for each, the newest checkpoint that is not after it stays."""
    losses: Callable[[], Mapping[int, float]] = dict
    """The evaluation losses by step: of the checkpoints that have one, the one with the lowest loss stays."""
    in_use: Callable[[], Iterable[int]] = tuple
    """The steps whose checkpoints are being read now."""

    def chosen(self, steps: Iterable[int]) -> set[int]:
        """Return those of these steps whose checkpoints stay."""
        ordered = sorted(steps)
        stay = set(ordered[-self.newest :])
        if self.every:
            stay |= {step for step in ordered if step % self.every == 0}
        stay |= set(ordered).intersection(self.in_use())
        for decided in self.decisions():
            stay |= set([step for step in ordered if step <= decided][-1:])
        losses = self.losses()
        judged = [step for step in ordered if not math.isnan(losses.get(step, math.nan))]
        return stay | set(sorted(judged, key=losses.__getitem__)[:1])
