"""The layouts of a recipe: the one of each stage, and the parts of a run that have one layout each."""

from dataclasses import replace
from itertools import groupby

from steptron.config.schema import ParallelConfig, Recipe


def parallel_of(recipe: Recipe, stage: str) -> ParallelConfig:
    """Return the layout of a stage: its own, or else the recipe's."""
    return recipe.stages[stage].parallel or recipe.parallel


def by_layout(recipe: Recipe) -> list[Recipe]:
    """Return the recipe in parts: neighbouring stages that have the same layout, which is the part's `parallel`."""
    parts = groupby(recipe.stages, key=lambda stage: parallel_of(recipe, stage))
    return [
        replace(recipe, parallel=parallel, stages={name: replace(recipe.stages[name], parallel=None) for name in names})
        for parallel, names in parts
    ]


def part_with(recipe: Recipe, stage: str) -> Recipe:
    """Return the part of the recipe (see `by_layout`) that has this stage."""
    return next(part for part in by_layout(recipe) if stage in part.stages)
