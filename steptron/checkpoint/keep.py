"""Which checkpoints stay: the newest ones, every so many steps one for good, and the one before each decision of a chosen kind."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Keep:
    """The rules; a checkpoint stays that any of them holds."""

    newest: int
    """So many of the newest."""
    every: int | None = None
    """Those of a step that is a multiple of it."""
    decisions: Callable[[], Iterable[int]] = tuple
    """Steps of decisions: the newest checkpoint that is not after each of them stays."""
    in_use: Callable[[], Iterable[int]] = tuple
    """Steps whose checkpoints are being read now."""

    def chosen(self, steps: Iterable[int]) -> set[int]:
        """Those of these steps whose checkpoints stay."""
        ordered = sorted(steps)
        stay = set(ordered[-self.newest :])
        if self.every:
            stay |= {step for step in ordered if step % self.every == 0}
        stay |= set(ordered).intersection(self.in_use())
        for decided in self.decisions():
            stay |= set([step for step in ordered if step <= decided][-1:])
        return stay
