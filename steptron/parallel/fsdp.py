"""Data parallel: FSDP2, each parameter over the mesh that suits it, in the compute precision, gradients summed in fp32.

    split over tp           → dp_shard × cp              (attention and dense FFN, embedding, output matrices)
    whole                   → dp_shard × cp × tp         (norms, routers, shared experts, eh_proj)
    routed experts          → edp_shard                  (each rank has its ep × etp share already)

With replicas (HSDP) the sum goes on over dp_replicate or edp_replicate. Gradients are summed, never averaged: each rank's loss is
already divided by the targets of the whole global batch, and every rank of a mesh adds what its own tokens, heads or columns did.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import DTensor, Shard

from steptron.config.schema import Precision
from steptron.model.mtp import MtpHead
from steptron.model.transformer import Transformer
from steptron.parallel.mesh import Meshes


def apply_fsdp(model: Transformer, meshes: Meshes, precision: Precision) -> None:
    """Shard every layer, MTP head and output matrix of an MTP head as a unit, and what is left (embedding, norm, output matrix) as the
    root unit.

    The output matrices are called after the root's forward pass. The root stays gathered until its backward pass; an MTP head does not,
    so that its matrix gathers itself."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    place = _placements(model, meshes)
    # One rank holds everything anyway, and a pipeline needs each layer again at once: gathering again would only cost time.
    again = meshes.layout.world_size > 1 and meshes.layout.dense["pp"] == 1
    matrices = [head.lm_head for head in model.mtp.values() if isinstance(head, MtpHead)]
    for unit in [*model.layers.values(), *matrices, *model.mtp.values()]:
        fully_shard(
            unit, mesh=meshes.shard_whole, shard_placement_fn=place, mp_policy=policy, reshard_after_forward=again
        )
    fully_shard(model, mesh=meshes.shard_whole, shard_placement_fn=place, mp_policy=policy, reshard_after_forward=False)
    for unit in model.modules():
        if isinstance(unit, FSDPModule) and meshes.layout.world_size > 1:
            unit.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum, which FSDP2 would take for a divide factor.
            unit.set_force_sum_reduction_for_comms(True)


def _placements(model: Transformer, meshes: Meshes) -> Callable[[nn.Parameter], ShardPlacementResult]:
    split, whole, expert = _infos(meshes.shard_split, meshes.shard_whole, meshes.shard_expert)
    experts = {p for moe in model.moe_layers().values() for p in moe.experts.parameters()}

    def place(parameter: nn.Parameter) -> ShardPlacementResult:
        if parameter in experts:
            return ShardPlacementResult(Shard(_expert_dim(parameter, expert.shard_mesh_size)), expert)
        return ShardPlacementResult(Shard(0), split if isinstance(parameter, DTensor) else whole)

    return place


def _expert_dim(parameter: nn.Parameter, shards: int) -> int:
    """0, whole experts on each rank, where their number allows it; else 1, rows of the matrices."""
    experts = parameter.to_local().shape[0] if isinstance(parameter, DTensor) else parameter.shape[0]
    return 0 if experts % shards == 0 else 1


def _infos(*meshes: DeviceMesh) -> list[FSDPMeshInfo]:
    """What FSDP wants to know of each mesh; the same object for meshes of the same ranks, whose communication it then joins."""
    by_groups: dict[tuple[str, ...], FSDPMeshInfo] = {}
    infos = []
    for mesh in meshes:
        groups = tuple(group.group_name for group in mesh.get_all_groups())
        if groups not in by_groups:
            replicated = mesh.ndim == 2
            by_groups[groups] = (
                HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)
                if replicated
                else FSDPMeshInfo(mesh, shard_mesh_dim=0)
            )
        infos.append(by_groups[groups])
    return infos
