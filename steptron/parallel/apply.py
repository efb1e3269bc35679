"""Lays a finished model over the meshes, in one fixed order (data parallel is last, so that it shards what the others left)."""

from steptron.config.schema import Precision
from steptron.model.transformer import Transformer
from steptron.parallel.fsdp import apply_fsdp
from steptron.parallel.mesh import Meshes


def apply_parallel(model: Transformer, meshes: Meshes, precision: Precision) -> None:
    """Distribute `model`, still on the meta device, in place."""
    apply_fsdp(model, meshes, precision)
