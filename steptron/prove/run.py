"""The proof from a recipe to its outcome: one process and many ranks, at the same time, compared.

recipe ─ shrink ─► Small ─┬─ Ranks(1), steps ────────────────────────────┬─ compare ─► Outcome
                          └─ Ranks(N), steps, save, other layout, steps ─┘
"""

import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from steptron.config.schema import Recipe
from steptron.prove.compare import Finding, compare, first_offending
from steptron.prove.shrink import Small, shrink
from steptron.prove.spawn import Around, Job, Ranks

MORE_STEPS = 1
"""Steps after the checkpoint is loaded."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a proof came to."""

    small: Small
    steps: int
    findings: list[Finding]
    """Under the layout of the proof."""
    findings_after: list[Finding]
    """After the checkpoint was loaded under another layout."""
    seconds: float

    @property
    def offending(self) -> Finding | None:
        """The first finding that does not hold; None: the layout is proved."""
        return first_offending([*self.findings, *self.findings_after])

    @property
    def exit_code(self) -> int:
        """0, or 3 where anything is off."""
        return 0 if self.offending is None else 3


def prove(
    recipe: Recipe,
    *,
    ranks: int = 8,
    steps: int = 3,
    stage: str = "",
    world_size: int | None = None,
    around: Around = nullcontext,
) -> Outcome:
    """Prove the recipe's layout. `around`: what each of the many ranks works inside of; the one process does not.

    Raises `RecipeError` or `MeshError` where the recipe cannot run, `ProofError` where a rank stops."""
    start = time.perf_counter()
    small = shrink(recipe, ranks, stage, world_size)
    many = Job(
        name="ranks", recipe=small.recipe, steps=steps, second=small.second, more_steps=MORE_STEPS, around=around
    )
    one = Job(name="one process", recipe=small.alone, steps=steps + MORE_STEPS)
    with (
        tempfile.TemporaryDirectory(prefix="steptron-prove-") as folder,
        Ranks(small.fit.layout.world_size, [many], Path(folder)) as world,
        Ranks(1, [one], Path(folder)) as alone,
    ):
        runs = world.wait(many)
        reference = alone.wait(one)[0].first
    first_moe_layer = small.recipe.model.num_dense_layers
    seconds = [run.second for run in runs if run.second is not None]
    return Outcome(
        small=small,
        steps=steps,
        findings=compare(reference, [run.first for run in runs], first_moe_layer),
        findings_after=compare(reference, seconds, first_moe_layer),
        seconds=time.perf_counter() - start,
    )
