"""What `steptron resume` may change of a run's recipe: the layout, budgets and schedules.

What its weights and the data it has seen depend on stays: the run would be another one. Where its folder is does not count.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from steptron.config.decode import encode, join
from steptron.config.schema import Recipe
from steptron.errors import RecipeError

FIXED = re.compile(
    r"(model|seed|precision|run\.name|optim\.matrices|stages\.[^.]+\.(seq_len|mix))(\..*)?",
)
"""Keys that a run keeps for life."""


def changes(old: Recipe, new: Recipe, renamed: bool = False) -> dict[str, list[Any]]:
    """Return key → [old value, new value] for every value that differs, run.dir left out; None stands for a key that is not there.

    `renamed`: run.name may differ too, as that of a copied run, which shares the second place and the metrics server else.
    Raises `RecipeError` where a run cannot go on with the new recipe: a fixed key differs, or stages that it has were
    taken out or moved.
    """
    before, after = _flat(encode(old), ""), _flat(encode(new), "")
    stages = list(old.stages)
    if list(new.stages)[: len(stages)] != stages:
        raise RecipeError(
            f"stages={', '.join(new.stages)}: a run keeps the stages it has ({', '.join(stages)}); "
            "new ones can follow them"
        )
    differing = {
        key: [before.get(key), after.get(key)]
        for key in [*before, *after]
        if before.get(key) != after.get(key) and key != "run.dir"
    }
    for key, (was, now) in differing.items():
        added = key.startswith("stages.") and key.split(".")[1] not in old.stages
        if FIXED.fullmatch(key) and not added and not (renamed and key == "run.name"):
            raise RecipeError(
                f"{key}={now} cannot change in a run, which has {was}; start a new one with `steptron train`"
            )
    return differing


def recipe_hash(recipe: Recipe) -> str:
    """32 hexadecimal digits of what the weights of a run are made by and that it keeps for life: equal for all its checkpoints.

    Stages are not in it, since others may follow, nor names; the data has a fingerprint of its own."""
    values = encode(recipe)
    kept = [values["model"], values["seed"], values["precision"], values["optim"]["matrices"]]
    return hashlib.blake2b(json.dumps(kept).encode(), digest_size=16).hexdigest()


def _flat(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    return {key: leaf for name, item in value.items() for key, leaf in _flat(item, join(path, name)).items()}
