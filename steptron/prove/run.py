"""The proof from a recipe to its outcome: one process and many ranks at the same time, compared.

recipe ─ shrink ─► Small ─┬─ Ranks(1), steps ────────────────────────────┬─ compare ─► Outcome
                          └─ Ranks(N), steps, save, other layout, steps ─┘
"""

import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from steptron.config.schema import Recipe
from steptron.prove.compare import Comparison, compare, first_offending, undecided
from steptron.prove.shrink import Small, shrink
from steptron.prove.spawn import Around, Ranks, TrialJob

MORE_STEPS = 1
"""The number of steps after the checkpoint is loaded."""

SEEDS = 3
"""The number of tries with other values and rows, if a token was so near a tie that rounding alone may decide it."""


@dataclass(frozen=True, kw_only=True)
class ProofOutcome:
    """The outcome of a proof."""

    small: Small
    steps: int
    findings: list[Comparison]
    """The findings under the layout of the proof."""
    findings_after: list[Comparison]
    """The findings after the checkpoint was loaded under another layout."""
    seed: int
    seconds: float

    @property
    def offending(self) -> Comparison | None:
        """Return the first finding that does not hold; None if the layout is proved."""
        return first_offending([*self.findings, *self.findings_after])

    @property
    def exit_code(self) -> int:
        """Return 0, or 3 if anything is wrong."""
        return 0 if self.offending is None else 3


def prove(
    recipe: Recipe,
    *,
    ranks: int = 8,
    steps: int = 3,
    world_size: int | None = None,
    around: Around = nullcontext,
) -> ProofOutcome:
    """Prove the recipe's layout in its first stage. `around`: a context in which each of the many ranks works; the one
    process does not.

    Raises `RecipeError` or `MeshError` if the recipe cannot run, and `ProofError` if a rank stops.
    """
    start = time.perf_counter()
    small = shrink(recipe, ranks, world_size)
    for seed in range(recipe.seed, recipe.seed + SEEDS):
        findings, findings_after = _compare(small, steps, seed, around)
        if not undecided([*findings, *findings_after]):
            break
    return ProofOutcome(
        small=small,
        steps=steps,
        findings=findings,
        findings_after=findings_after,
        seed=seed,
        seconds=time.perf_counter() - start,
    )


def _compare(small: Small, steps: int, seed: int, around: Around) -> tuple[list[Comparison], list[Comparison]]:
    """Return the findings before and after the checkpoint is loaded."""
    first, second, alone = (replace(recipe, seed=seed) for recipe in (small.recipe, small.second, small.alone))
    many = TrialJob(name="ranks", recipe=first, steps=steps, second=second, more_steps=MORE_STEPS, around=around)
    one = TrialJob(name="one process", recipe=alone, steps=steps + MORE_STEPS)
    with (
        tempfile.TemporaryDirectory(prefix="steptron-prove-") as folder,
        Ranks(small.fit.layout.world_size, [many], Path(folder)) as ranks,
        Ranks(1, [one], Path(folder)) as process,
    ):
        runs = ranks.wait(many)
        reference = process.wait(one)[0].first
    first_moe_layer = first.model.num_dense_layers
    after = [run.second for run in runs if run.second is not None]
    return (
        compare(reference, [run.first for run in runs], first_moe_layer),
        compare(reference, after, first_moe_layer),
    )
