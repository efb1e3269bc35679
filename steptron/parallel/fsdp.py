"""Data parallel: FSDP2 over the dense view's data axes, parameters in the compute precision, gradients summed in fp32.

Gradients are summed, never averaged: each rank's loss is already divided by the targets of the whole global batch.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from steptron.config.schema import Precision
from steptron.model.transformer import Transformer
from steptron.parallel.mesh import Meshes


def apply_fsdp(model: Transformer, meshes: Meshes, precision: Precision) -> None:
    """Shard every layer and MTP head as a unit, and what is left (embedding, norm, output matrix) as the root unit."""
    mesh = _data_mesh(meshes)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    # One rank holds everything anyway: freeing and copying again in the backward pass would only cost time.
    reshard = meshes.layout.world_size > 1
    for unit in [*model.layers.values(), *model.mtp.values()]:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for unit in model.modules():
        if isinstance(unit, FSDPModule) and meshes.layout.world_size > 1:
            unit.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum, which FSDP2 would take for a divide factor.
            unit.set_force_sum_reduction_for_comms(True)


def _data_mesh(meshes: Meshes) -> DeviceMesh:
    if meshes.layout.dense["dp_replicate"] > 1:
        return meshes.dense["dp_replicate", "dp_shard"]
    return meshes.dense["dp_shard"]
