"""Private names of torch, and differences between its releases, each behind a function or name that says its purpose.

Code outside this file uses torch's public names only (`tests/test_torch_internals.py` checks it). A newer torch may
rename a private name without notice: then this is the one place to change. Every entry says what it is, why no public
name will do, and which release may break it. The releases that were tried are the range of `torch` in pyproject.toml.

Legend: Q queries, J keys, H query heads, K KV heads, A head_dim, M, N rows, D their width, S documents + 1.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Store, distributed_c10d  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed import _functional_collectives as functional
from torch.distributed.checkpoint import metadata as checkpoint_metadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining._backward import _get_grad_fn_or_grad_acc, stage_backward_weight
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# ---------------------------------------------------------------------------------------------------------------------
# Process groups and meshes

__all__ = ["TorchDispatchMode", "functional", "tree_leaves"]
"""`functional` are the collectives of DTensor and FSDP2. Waits are timed where all callers look `wait_tensor` up: in
this module. It was never made public, and has kept its name since torch 2.1. `TorchDispatchMode` sees every operation,
and `tree_leaves` its tensors; torch's own documentation names both with their private modules, since torch 2.0."""


def process_groups() -> list[ProcessGroup]:
    """Return every process group that this rank belongs to, those of meshes included.

    torch has no public list of them. `_world` has held it since torch 2.0."""
    return list(distributed_c10d._world.pg_map)


def record_memory_history(on: bool) -> None:
    """Begin or end the record of every allocation of CUDA memory. torch documents these functions for its memory
    viewer, with the underscore, since torch 2.1."""
    torch.cuda.memory._record_memory_history(enabled="all" if on else None)


def dump_memory_history(path: Path) -> None:
    """Write the record of CUDA memory that `record_memory_history` has begun, for pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(str(path))


def watch_storage(tensor: Tensor) -> tuple[int, Callable[[], bool], int]:
    """Return a number of the tensor's storage, a function that tells whether it has been freed, and its bytes.

    The number is unique as long as the storage lives, also on the meta device, where all addresses are 0. torch has the
    reference for its multiprocessing, and `_cdata` under it, since torch 1.0."""
    storage = tensor.untyped_storage()
    reference = StorageWeakRef(storage)
    return reference.cdata, reference.expired, storage.nbytes()


def default_store() -> Store:
    """Return the key-value store of the default process group. torch has no public way to it."""
    return distributed_c10d._get_default_store()


def split_mesh(mesh: DeviceMesh, axes: dict[str, int]) -> DeviceMesh:
    """Return a mesh of one axis as a mesh of several. The public constructor would make all process groups anew."""
    return mesh._unflatten(0, tuple(axes.values()), tuple(axes))


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Return a mesh with all its axes joined to one of this name. DTensor's own users flatten this way; it was
    announced as public, so a later release may drop the underscore."""
    return mesh._flatten(name)


def join_meshes(meshes: Sequence[DeviceMesh]) -> DeviceMesh:
    """Return one mesh with the axes of several cut from the same mesh. `_concatenate` came with torch 2.10."""
    return DeviceMesh._concatenate(list(meshes))


all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
"""torch 2.13 gave both collectives these names and warns of the old ones."""


def start_all_gather(values: Tensor, group: ProcessGroup) -> Tensor:
    """Start a gather of [N, …] to [ranks · N, …] outside autograd. Wait for it with `functional.wait_tensor`.

    `functional.all_gather_tensor` would return a tensor subclass, which autograd functions and compiled code cannot
    take. The operators' names have been stable since torch 2.1."""
    return torch.ops._c10d_functional.all_gather_into_tensor(values, dist.get_world_size(group), group.group_name)


def start_reduce_scatter(values: Tensor, group: ProcessGroup) -> Tensor:
    """Start a sum of [ranks · N, …] of which each rank gets its [N, …], as `start_all_gather` does."""
    return torch.ops._c10d_functional.reduce_scatter_tensor(values, "sum", dist.get_world_size(group), group.group_name)


def start_all_to_all(values: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    """Start an exchange of rows, as many as counted from and to each rank, as `start_all_gather` does."""
    return torch.ops._c10d_functional.all_to_all_single(values, received, sent, group.group_name)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters in shards


def is_strided(placement: Placement) -> bool:
    """Return whether a placement cuts what an earlier one has left of the same dim.

    FSDP2 marks parameters that tensor or expert parallelism has split so. A later release may replace the mark."""
    return isinstance(placement, _StridedShard)


def strided_shard(dim: int, split_factor: int) -> Placement:
    """Return the placement for which `is_strided` holds; `split_factor` is the number of parts of the other split."""
    return _StridedShard(dim, split_factor=split_factor)


SHARDS_BY_PARAMETER = hasattr(_fsdp_common, "ShardPlacementResult")
"""True if FSDP2 can shard the parameters of one module over different meshes. torch 2.11 cannot."""


def shard_placements(meshes: Sequence[DeviceMesh]) -> list[Callable[[int], Any]]:
    """Return a function for each mesh: dim → the answer of FSDP2's `shard_placement_fn` for a parameter split along it.

    Meshes of the same process groups share one description, so that FSDP2 joins their communication. Where
    `SHARDS_BY_PARAMETER` is false, the answer names the dim alone, and all meshes must have the same ranks.
    FSDP2 exports none of the three classes, and their module has moved before."""
    if not SHARDS_BY_PARAMETER:
        return [lambda dim: Shard(dim) for _ in meshes]
    infos: dict[tuple[str, ...], Any] = {}
    for mesh in meshes:
        infos.setdefault(_group_names(mesh), _mesh_info(mesh))
    described = [infos[_group_names(mesh)] for mesh in meshes]
    return [lambda dim, info=info: _fsdp_common.ShardPlacementResult(Shard(dim), info) for info in described]


def _mesh_info(mesh: DeviceMesh) -> Any:
    if mesh.ndim == 2:
        return _fsdp_common.HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)
    return _fsdp_common.FSDPMeshInfo(mesh, shard_mesh_dim=0)


def _group_names(mesh: DeviceMesh) -> tuple[str, ...]:
    return tuple(group.group_name for group in mesh.get_all_groups())


def reduce_unit(unit: FSDPModule) -> None:
    """Start to reduce the gradients that FSDP2 holds for the parameters of a unit, but not for those of units in it.

    FSDP2 does so itself only in a backward pass that computes the gradient of the unit's input."""
    state = unit._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)  # torch 2.11 has one group a unit
    for group in [state._fsdp_param_group] if several is None else several:
        if group is not None:
            group.post_backward()


MemoryFormat = checkpoint_metadata._MEM_FORMAT_ENCODING
"""The enumeration in torch's description of a saved tensor. It is part of every `.metadata` file, under this name."""

# ---------------------------------------------------------------------------------------------------------------------
# Pipelines


def pair_of_passes(action: Any, context: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the forward and the backward pass of an action that a schedule of torch pairs (`OVERLAP_F_B`).

    `action` and `context` are what a function gets that is registered for this action. The passes do what torch would
    do with them one after the other; torch has no public function for a single pass, but tells users to write this."""
    schedule, (forward, backward) = context.schedule_ref, action.sub_actions
    stages: dict[int, PipelineStage] = {stage.stage_index: stage for stage in schedule._stages}

    def run_forward() -> None:
        number, n = forward.stage_index, forward.microbatch_index
        stage, following = stages[number], stages.get(number + 1)
        schedule._assert_unsharded(stage)
        if not stage.is_first and number - 1 not in stages:
            schedules._wait_batch_p2p(schedule.fwd_recv_ops.pop((number, n)))
        output = stage.forward_one_chunk(n, context.arg_mbs[n], context.kwarg_mbs[n], save_forward_output=False)
        schedule._maybe_compute_loss(stage, output, context.target_mbs, n)
        if following is not None:
            following.set_local_fwd_input(output, n)

    def run_backward() -> None:
        number, n = backward.stage_index, backward.microbatch_index
        stage, previous = stages[number], stages.get(number - 1)
        schedule._assert_unsharded(stage)
        if not stage.is_last and number + 1 not in stages:
            schedules._wait_batch_p2p(schedule.bwd_recv_ops.pop((number, n)))
        schedule.backward_counter[number] += 1
        last = schedule.backward_counter[number] == schedule._n_microbatches
        stage.backward_one_chunk(n, loss=schedule._maybe_get_loss(stage, n), last_backward=last)
        if previous is not None:
            previous.set_local_bwd_input(stage.get_local_bwd_output(n), n)

    return run_forward, run_backward


def backward_of_weights(
    groups: Sequence[dict[str, Any]], units: Mapping[nn.Parameter, FSDPModule]
) -> Iterator[FSDPModule]:
    """Compute the gradients of weights that a backward pass for inputs alone has left out, unit after unit.

    `groups` is torch's list of parameters with the gradients of their results. Yields each unit when the gradients of
    all its parameters are there. torch's own function takes all groups, but nothing connects one with another."""
    nodes = {_get_grad_fn_or_grad_acc(weight): weight for weight in units}
    # torch's groups are sets. All ranks must see the units in the same order: that of their last weights.
    weights = [[weight for node, weight in nodes.items() if node in group["params"]] for group in groups]
    touched = [{units[weight] for weight in some} for some in weights]
    left = Counter(unit for some in touched for unit in some)
    order = list(dict.fromkeys(reversed(list(units.values()))))
    for group, some, done in zip(groups, weights, touched, strict=True):
        stage_backward_weight(iter(some), [group])
        left.subtract(done)
        while order and not left[order[-1]]:
            yield order.pop()
    yield from reversed(order)


# ---------------------------------------------------------------------------------------------------------------------
# Modules and autograd


def forward_hooks(module: nn.Module) -> Iterator[dict[int, Callable[..., Any]]]:
    """Yield the tables of a module's hooks before and after `forward`, to change in place. torch can only add hooks."""
    yield module._forward_pre_hooks
    yield module._forward_hooks


def in_backward() -> bool:
    """Return whether autograd runs on this thread. A forward pass is then one that activation checkpointing repeats.

    torch's own activation checkpointing asks in this way, so the name is likely to stay as long as that does."""
    return torch._C._current_graph_task_id() != -1


# ---------------------------------------------------------------------------------------------------------------------
# Kernels

VARLEN_TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""True if variable-length attention must be told of grouped queries. torch 2.11 has no such argument: its kernel takes
fewer KV heads than query heads as they come."""


def flash_attention(
    q_QHA: Tensor,
    k_JKA: Tensor,
    v_JKA: Tensor,
    cu_queries_S: Tensor,
    cu_keys_S: Tensor,
    longest: tuple[int, int],
    window_size: tuple[int, int],
) -> Tensor:
    """Return o [Q, H, A]: the queries of each document over its keys, last query and last key aligned (CUDA, half
    precision).

    `cu_queries_S`, `cu_keys_S`: where documents start, int32. `longest`: most queries and most keys of a document.
    `window_size`: keys before and after the query's own that it sees; −1: all."""
    gqa: dict[str, Any] = {"enable_gqa": True} if VARLEN_TAKES_GQA else {}
    o_QHA = varlen_attn(q_QHA, k_JKA, v_JKA, cu_queries_S, cu_keys_S, *longest, window_size=window_size, **gqa)
    assert isinstance(o_QHA, Tensor), "varlen_attn returns a pair only when asked for the log-sum-exp"
    return o_QHA


def flash_forward(
    q_QHA: Tensor, k_JKA: Tensor, v_JKA: Tensor, cu_queries: tuple[int, ...], cu_keys: tuple[int, ...], causal: bool
) -> tuple[Tensor, Tensor]:
    """Return o [Q, H, A] and the log-sum-exp [H, Q] of one variable-length call (CUDA, half precision).

    `cu_queries`, `cu_keys`: where documents start, and the number of all. The public function has no backward pass that
    takes a log-sum-exp over more keys than these. Releases have appended arguments to both operators."""
    sizes = _flash_sizes(cu_queries, cu_keys, q_QHA.device)
    o_QHA, lse_HQ, *_ = torch.ops.aten._flash_attention_forward(q_QHA, k_JKA, v_JKA, *sizes, 0.0, causal, False)
    return o_QHA, lse_HQ


def flash_backward(
    grad_o_QHA: Tensor,
    q_QHA: Tensor,
    k_JKA: Tensor,
    v_JKA: Tensor,
    o_QHA: Tensor,
    lse_HQ: Tensor,
    cu_queries: tuple[int, ...],
    cu_keys: tuple[int, ...],
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v through these keys; o and the log-sum-exp are those over all keys."""
    sizes = _flash_sizes(cu_queries, cu_keys, q_QHA.device)
    # The random state and its partner are for dropout, which there is none of.
    state = torch.zeros(2, dtype=torch.uint64, device=q_QHA.device), torch.empty(0, device=q_QHA.device)
    tensors = (grad_o_QHA, q_QHA, k_JKA, v_JKA, o_QHA, lse_HQ)
    return torch.ops.aten._flash_attention_backward(*tensors, *sizes, 0.0, causal, *state)


@lru_cache(maxsize=256)
def _flash_sizes(
    cu_queries: tuple[int, ...], cu_keys: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, int, int]:
    cu = [torch.tensor(cu, dtype=torch.int32, device=device) for cu in (cu_queries, cu_keys)]
    longest = [max(stop - start for start, stop in pairwise(cu)) for cu in (cu_queries, cu_keys)]
    return cu[0], cu[1], longest[0], longest[1]


def softmax_backward(grad_p: Tensor, p: Tensor) -> Tensor:
    """Return the gradient of a softmax's input along the last dim from its output, in one pass over memory.

    It is the operator that autograd calls; torch has no public name for it."""
    return torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)


def onednn_matmul_nt(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """Return a · bᵀ through oneDNN's linear layer (fp32, CPU). `torch.mm` takes MKL, and no setting changes that.

    torch's compiler emits this operator, so its arguments follow the compiler's needs."""
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")
