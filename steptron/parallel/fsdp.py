"""Data parallel: FSDP2 shards each parameter over the mesh that suits it; gradients are summed in fp32.

    split by tp             → dp_shard × cp              (attention and dense FFN, embedding, output matrices)
    not split               → dp_shard × cp × tp         (norms, routers, shared experts, eh_proj)
    routed experts          → edp_shard                  (each rank already has its ep × etp share)

Computation uses the recipe's precision. With replicas (HSDP), gradients are also summed over dp_replicate or
edp_replicate. They are summed, never averaged: each rank's loss is already divided by the targets of the global batch,
and each rank of a mesh adds the part of its own tokens, heads or columns.

Without a pipeline, the backward pass of every micro-batch reduces unit by unit: sums over micro-batches are of shards.
A pipeline keeps everything gathered anyway, and reduces in its last backward pass (`pipeline_stage.py`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from steptron.config.schema import Precision
from steptron.model.transformer import Transformer
from steptron.parallel.mesh import Meshes
from steptron.torch_internals import shard_placements


def apply_fsdp(model: Transformer, meshes: Meshes, precision: Precision) -> None:
    """Shard every layer, every MTP head and every output matrix of an MTP head as a unit; the rest is the root unit.

    The root has the embedding, the final norm and the output matrix. Output matrices are called after the root's
    forward pass. The root stays gathered until its backward pass. An MTP head does not, so its output matrix is a unit
    that gathers itself.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    place = _placements(model, meshes)
    # A single rank holds everything anyway, and a pipeline soon needs each layer again: another gather would only cost
    # time.
    again = meshes.layout.world_size > 1 and meshes.layout.dense["pp"] == 1
    matrices = [head for h, head in model.output_heads().items() if h > 0]
    for unit in [*model.layers.values(), *matrices, *model.mtp.values()]:
        fully_shard(
            unit, mesh=meshes.shard_whole, shard_placement_fn=place, mp_policy=policy, reshard_after_forward=again
        )
    fully_shard(model, mesh=meshes.shard_whole, shard_placement_fn=place, mp_policy=policy, reshard_after_forward=False)
    for unit in model.modules():
        if isinstance(unit, FSDPModule) and meshes.layout.world_size > 1:
            unit.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum, with which FSDP2 would implement the divide factor.
            unit.set_force_sum_reduction_for_comms(True)


def _placements(model: Transformer, meshes: Meshes) -> Callable[[nn.Parameter], Any]:
    of_split, of_whole, of_experts = shard_placements((meshes.shard_split, meshes.shard_whole, meshes.shard_expert))
    experts = {p for moe in model.moe_layers().values() for p in moe.experts.parameters()}
    shards = meshes.layout.expert["edp_shard"]

    def place(parameter: nn.Parameter) -> Any:
        if parameter in experts:
            return of_experts(_expert_dim(parameter, shards))
        return of_split(0) if isinstance(parameter, DTensor) else of_whole(0)

    return place


def _expert_dim(parameter: nn.Parameter, shards: int) -> int:
    """Return 0, which puts complete experts on each rank, if their number allows it; else 1, rows of their matrices."""
    experts = parameter.to_local().shape[0] if isinstance(parameter, DTensor) else parameter.shape[0]
    return 0 if experts % shards == 0 else 1
