"""Lays a finished model over the meshes, in one fixed order (data parallel is last, so that it shards what the others left)."""

from steptron.config.schema import Precision
from steptron.errors import MeshError
from steptron.model.transformer import Transformer
from steptron.parallel.fsdp import apply_fsdp
from steptron.parallel.mesh import Layout, Meshes


def check_supported(layout: Layout) -> None:
    """Raise `MeshError` for an axis that is not built yet, rather than train as if it were 1."""
    for view, axes in (("dense", layout.dense), ("expert", layout.expert)):
        for axis, size in axes.items():
            if size > 1 and not axis.endswith(("dp_replicate", "dp_shard")):
                key = axis if axis == "pp" else f"{view}.{axis}"
                raise MeshError(
                    f"parallel.{key}={size} is not supported yet; set it to 1 (data parallel is: parallel.dense.dp_shard)"
                )
    for axis in ("dp_replicate", "dp_shard"):
        if layout.dense[axis] != layout.expert["e" + axis]:
            raise MeshError(
                f"parallel.expert.{axis}={layout.expert['e' + axis]} differs from parallel.dense.{axis}={layout.dense[axis]}, "
                "which is not supported yet; give both views the same"
            )


def apply_parallel(model: Transformer, meshes: Meshes, precision: Precision) -> None:
    """Distribute `model`, still on the meta device, in place."""
    apply_fsdp(model, meshes, precision)
