"""Warnings about values that are allowed and most likely a slip."""

from collections.abc import Iterator, Mapping
from typing import Any

from steptron.config.schema import Recipe

LARGEST_PEAK = 3e-3
"""The largest learning rate of the recipes that come with Steptron, the demo's. Muon and AdamW share it, because Muon's
updates are scaled to the size of AdamW's."""
TOO_MANY = 100
"""The factor above the usual learning rate from which a warning is given."""


def high_rates(recipe: Recipe, before: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each stage whose peak learning rate is `TOO_MANY` times the usual one or more.

    The usual one is the stage's own in `before`, the recipe without changes of values, and `LARGEST_PEAK` at most.
    """
    for name, stage in recipe.stages.items():
        own = _peak(before, name)
        usual = min(own, LARGEST_PEAK) if own > 0 else LARGEST_PEAK
        if stage.lr.peak >= TOO_MANY * usual * (1 - 1e-9):
            yield (
                f"warning: stages.{name}.lr.peak={stage.lr.peak:g} is {stage.lr.peak / usual:,.0f} times the usual "
                f"{usual:g}; losses will likely diverge"
            )


def _peak(before: Mapping[str, Any], stage: str) -> float:
    """Return the stage's peak in a recipe that is not decoded yet, and 0 if there is none."""
    found: Any = before
    for key in ("stages", stage, "lr", "peak"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) else 0.0
