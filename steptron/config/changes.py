"""The recipe keys that a resume may not change, and the hash of the settings that checkpoints carry.

Values that decide the weights or the data already seen are fixed: with another value it would be another run. The
location of the run folder does not count as a change.
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
    r"(model|seed|precision|run\.name|optim\.matrix_optimizer|stages\.[^.]+\.(seq_len|mix|packing|min_length|max_length))(\..*)?",
)
"""The keys that a run keeps for life."""


def changes(old: Recipe, new: Recipe, renamed: bool = False) -> dict[str, list[Any]]:
    """Return key → [old value, new value] for every value that differs, without run.dir. None stands for a missing key.

    `renamed`: run.name may differ too. The copy of a run needs this, because it would otherwise share the mirror
    and the metrics server with the original. Raises `RecipeError` if the run cannot continue with the new recipe: a
    fixed key differs, or existing stages were removed or moved.
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
    """Return 32 hexadecimal digits over the settings that decide a run's weights and that it keeps for life.

    All checkpoints of a run have the same hash. Stages and names are not part of it, because stages may be added. The
    data has its own fingerprint.
    """
    values = encode(recipe)
    kept = [values["model"], values["seed"], values["precision"], values["optim"]["matrix_optimizer"]]
    return hashlib.blake2b(json.dumps(kept).encode(), digest_size=16).hexdigest()


def _flat(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    return {key: leaf for name, item in value.items() for key, leaf in _flat(item, join(path, name)).items()}
