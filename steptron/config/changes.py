"""The recipe keys that a resume may not change, and the hash of the settings that checkpoints carry.

Values that decide the weights are fixed: with another value it would be another run. The location of the run folder
does not count as a change. What a run has drawn from its data is compared with its checkpoint (data/drawn.py).
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from steptron.config.decode import encode, join
from steptron.config.schema import Recipe
from steptron.errors import RecipeError

FIXED = re.compile(r"(model|seed|precision|run\.name|optim\.matrix_optimizer)(\..*)?")
"""The keys that a run keeps for life."""


UNSET_CHUNK = 256
"""The default of model.loss_chunk before it was `auto`. A run that began with the one may go on with the other: they
differ in the order of a sum."""


def changes(old: Recipe, new: Recipe, renamed: bool = False) -> dict[str, list[Any]]:
    """Return key → [old value, new value] for every value that differs, without run.dir. None stands for a missing key.

    `renamed`: run.name may differ too. The copy of a run needs this, because it would otherwise share the mirror
    and the metrics server with the original. Raises `RecipeError` if a fixed key differs.
    """
    before, after = flat(encode(old)), flat(encode(new))
    differing = {
        key: [before.get(key), after.get(key)]
        for key in [*before, *after]
        if before.get(key) != after.get(key) and key != "run.dir"
    }
    for key, (was, now) in differing.items():
        if key == "model.loss_chunk" and {was, now} == {"auto", UNSET_CHUNK}:
            continue
        if FIXED.fullmatch(key) and not (renamed and key == "run.name"):
            raise RecipeError(
                f"{key}={now} cannot change in a run, which has {was}; start a new one with `steptron train`"
            )
    return differing


def recipe_hash(recipe: Recipe) -> str:
    """Return 32 hexadecimal digits over the settings that decide a run's weights and that it keeps for life.

    All checkpoints of a run have the same hash. Names, stages and data are not part of it: stages may be added, and a
    checkpoint keeps the facts about the data that it was trained on.
    """
    values = encode(recipe)
    if values["model"]["loss_chunk"] == "auto":
        values["model"]["loss_chunk"] = UNSET_CHUNK
    kept = [values["model"], values["seed"], values["precision"], values["optim"]["matrix_optimizer"]]
    return hashlib.blake2b(json.dumps(kept).encode(), digest_size=16).hexdigest()


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their full keys, such as `stages.base.tokens`."""
    if not isinstance(value, Mapping):
        return {path: value}
    return {key: leaf for name, item in value.items() for key, leaf in flat(item, join(path, name)).items()}
