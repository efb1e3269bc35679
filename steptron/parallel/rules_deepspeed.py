"""Layouts that `engine: deepspeed` supports: data parallel and, with ZeRO 1 or 2, expert parallel on the same ranks."""

from steptron.errors import MeshError
from steptron.parallel.mesh import Layout, recipe_key

WHY = {
    "pp": "ZeRO shards over all ranks, but each pipeline stage needs an optimizer of its own",
    "cp": "sequence pieces are exchanged over native meshes, which ZeRO does not use",
    "tp": "ZeRO assumes that no parameter is split, and counts split ones wrongly",
    "dp_replicate": "ZeRO shards over all data-parallel ranks and has no replicas",
}
"""Axes of the dense view that must be 1, with the reason."""
WHY_EXPERT = {
    "edp_replicate": "ZeRO shards experts over all ranks that hold them and has no replicas",
    "etp": "ZeRO assumes that no expert is split",
}
"""Axes of the expert view that must be 1, with the reason."""


def check_deepspeed(zero: int, layout: Layout) -> None:
    """Raise `MeshError` at the first axis that DeepSpeed does not support. `zero`: the stage of ZeRO."""
    for axes, why in ((layout.dense, WHY), (layout.expert, WHY_EXPERT)):
        for axis, reason in why.items():
            if axes[axis] > 1:
                raise MeshError(
                    f"{recipe_key(axis)}={axes[axis]} must be 1 with engine=deepspeed: {reason}; "
                    "set it to 1, or engine=native"
                )
    if zero == 3 and layout.expert["ep"] > 1:
        raise MeshError(
            f"parallel.expert.ep={layout.expert['ep']} must be 1 with deepspeed.zero=3: ZeRO 3 shards every "
            "parameter over all ranks, also those of experts; set it to 1, deepspeed.zero to 1 or 2, or engine=native"
        )
