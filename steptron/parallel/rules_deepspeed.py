"""Layouts that `engine: deepspeed` can do: data parallel ranks, and at ZeRO 1 and 2 expert parallel ones over the same ranks."""

from steptron.config.schema import Recipe
from steptron.errors import MeshError
from steptron.parallel.mesh import Layout, recipe_key

WHY = {
    "pp": "a pipeline stage would need an optimizer of its own, and ZeRO's ranks are all ranks",
    "cp": "sequence pieces are exchanged by native meshes, which ZeRO does not know",
    "tp": "ZeRO takes every parameter for whole, and counts split ones wrongly",
    "dp_replicate": "ZeRO shards over all data-parallel ranks, it has no replicas",
}
"""Axes of the dense view that have to be 1."""
WHY_EXPERT = {
    "edp_replicate": "ZeRO shards experts over all ranks that hold them, it has no replicas",
    "etp": "ZeRO takes every expert for whole",
}
"""Axes of the expert view that have to be 1."""


def check_deepspeed(recipe: Recipe, layout: Layout) -> None:
    """Raise `MeshError` at the first axis that DeepSpeed cannot do."""
    for axes, why in ((layout.dense, WHY), (layout.expert, WHY_EXPERT)):
        for axis, reason in why.items():
            if axes[axis] > 1:
                raise MeshError(
                    f"{recipe_key(axis)}={axes[axis]} must be 1 with engine=deepspeed: {reason}; set it to 1, or engine=native"
                )
    if recipe.deepspeed.zero == 3 and layout.expert["ep"] > 1:
        raise MeshError(
            f"parallel.expert.ep={layout.expert['ep']} must be 1 with deepspeed.zero=3: ZeRO 3 shards every parameter over all ranks, "
            "those of experts too; set it to 1, deepspeed.zero to 1 or 2, or engine=native"
        )
