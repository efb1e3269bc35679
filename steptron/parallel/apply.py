"""Build this rank's part of the network from the recipe, in one fixed order.

    split into stages → tensor parallel → expert parallel → context parallel → recomputation → compile → FSDP → values

Each step changes a model on the meta device from outside. FSDP comes last, so that it shards what the other steps have
left. An engine that shards parameters itself gets them unsharded, except that experts are still split over
expert-parallel ranks (`build_unsharded`).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from steptron.config.schema import Recipe
from steptron.model.init import initialise
from steptron.model.parts import Part, whole
from steptron.model.transformer import Transformer
from steptron.moe.backend import Backend
from steptron.moe.experts import choose_backend
from steptron.nn.attention import Attention, choose_attention
from steptron.nn.elementwise import Chosen, choose_elementwise
from steptron.nn.to_local import local
from steptron.parallel.compile import apply_compile
from steptron.parallel.cp import apply_cp
from steptron.parallel.elementwise import apply_elementwise
from steptron.parallel.ep import apply_expert_parallel, take_turns
from steptron.parallel.fsdp import apply_fsdp
from steptron.parallel.mesh import Meshes
from steptron.parallel.network import InTurn, Network
from steptron.parallel.pipeline_split import cut, ranks_of_stages
from steptron.parallel.pp import Pipeline
from steptron.parallel.recompute import apply_recompute
from steptron.parallel.tied_embedding import tie_embeddings
from steptron.parallel.tp import apply_tp
from steptron.parallel.turns import Turns


def build_network(recipe: Recipe, meshes: Meshes, device: torch.device) -> Network:
    """Return this rank's stages, distributed over the meshes, with their initial values."""
    parallel, pp = recipe.parallel, meshes.layout.dense["pp"]
    cuts = cut(recipe, pp)
    owners = ranks_of_stages(parallel.pipeline, pp)
    mine = [stage for stage, rank in enumerate(owners) if rank == meshes.dense.get_local_rank("pp")]
    kernels = _choose_kernels(recipe, meshes, device)
    parts = {stage: _build_part(recipe, meshes, device, cuts[stage], kernels, distribute) for stage in mine}
    if pp == 1:
        return Network(parts, InTurn(parts[0]), None)
    group, turns = meshes.dense["pp"].get_group(), Turns()
    for part in parts.values():
        take_turns(part.moe_layers().values(), turns)
    pipeline = Pipeline(
        parts,
        cuts,
        parallel.pipeline,
        owners,
        group,
        torch.bfloat16 if recipe.precision == "bf16" else next(parts[mine[0]].parameters()).dtype,
        meshes.layout.dense["tp"],
        recomputes=bool({"attention", "ffn"} & set(parallel.recompute.parts)),
        turns=turns,
    )
    stage_ranks = [torch.distributed.get_global_rank(group, rank) for rank in owners]
    return Network(parts, pipeline, tie_embeddings(parts, cuts, stage_ranks, group))


def build_unsharded(recipe: Recipe, meshes: Meshes, device: torch.device) -> Transformer:
    """Return the network for data- and expert-parallel ranks, as plain tensors with their initial values."""
    kernels = _choose_kernels(recipe, meshes, device)
    model = _build_part(recipe, meshes, device, whole(recipe.model), kernels, split)
    for moe in model.moe_layers().values():
        for name, weight in list(moe.experts.named_parameters()):
            moe.experts.register_parameter(name, nn.Parameter(local(weight).detach()))
    return model


def distribute(model: Transformer, recipe: Recipe, meshes: Meshes) -> None:
    """Distribute a model on the meta device over the ranks and shard it, in place."""
    split(model, recipe, meshes)
    apply_fsdp(model, meshes, recipe.precision)


def split(model: Transformer, recipe: Recipe, meshes: Meshes) -> None:
    """Split the modules of a model on the meta device over the ranks, but do not shard it, in place."""
    parallel = recipe.parallel
    apply_tp(model, meshes.dense["tp"])
    apply_expert_parallel(model.moe_layers().values(), meshes.expert, parallel.ep_dispatch)
    for moe in model.moe_layers().values():
        moe.row_group = meshes.row.get_group() if meshes.row.size() > 1 else None
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    if meshes.layout.dense["cp"] > 1:
        apply_cp(attentions, meshes.dense["cp"].get_group(), parallel.cp_method)
    apply_recompute(model, parallel.recompute)
    if parallel.compile:
        apply_compile(model)


class _Kernels(NamedTuple):
    """The implementations that were chosen for the device."""

    experts: Backend
    elementwise: Chosen


def _choose_kernels(recipe: Recipe, meshes: Meshes, device: torch.device) -> _Kernels:
    """Set the attention's kernel for the process, and return the others. Raises `RecipeError`."""
    kinds = recipe.model.full, recipe.model.sliding
    choose_attention(recipe.kernels.attention, device, recipe.precision, recipe.model.head_dim, kinds)
    widths = recipe.model.hidden_size, recipe.model.moe.ffn_size // meshes.layout.expert["etp"]
    experts = choose_backend(recipe.kernels.experts, device, recipe.precision, widths)
    return _Kernels(experts, choose_elementwise(recipe.kernels.elementwise, device))


def _build_part(
    recipe: Recipe,
    meshes: Meshes,
    device: torch.device,
    part: Part,
    kernels: _Kernels,
    lay: Callable[[Transformer, Recipe, Meshes], None],
) -> Transformer:
    with torch.device("meta"):
        model = Transformer(recipe.model, part)
    for moe in model.moe_layers().values():
        moe.experts.backend = kernels.experts
        moe.capacity = None if recipe.kernels.capacity == "exact" else recipe.kernels.capacity
    lay(model, recipe, meshes)
    apply_elementwise(model, kernels.elementwise, recipe.parallel.compile)
    model.to_empty(device=device)
    initialise(model, recipe.seed, recipe.model.init_std)
    model.train()
    return model
