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


def ranks_of_stages(recipe: Recipe, ranks: int) -> dict[str, int]:
    """Return the number of ranks of each stage: its own, or else that of the stage before. `ranks`: that of the first
    one, if it has none of its own."""
    found: dict[str, int] = {}
    for name in recipe.stages:
        ranks = parallel_of(recipe, name).ranks or ranks
        found[name] = ranks
    return found


def since(recipe: Recipe, stage: str) -> Recipe:
    """Return the recipe from this stage on."""
    names = list(recipe.stages)
    return replace(recipe, stages={name: recipe.stages[name] for name in names[names.index(stage) :]})


def part_with(recipe: Recipe, stage: str) -> Recipe:
    """Return the part of the recipe (see `by_layout`) that has this stage."""
    return next(part for part in by_layout(recipe) if stage in part.stages)
