"""A model of odd shapes, laid over ranks in each of the ways that tensor, expert and data parallel divide parameters
together."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from steptron.nn.shard_geometry import rectangle
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


@dataclass(frozen=True)
class Kind:
    """A parameter: its shape, the dim (dims: ep, etp) that its layer splits, the dim that FSDP splits, its pipeline
    stage."""

    shape: tuple[int, ...]
    view: str
    dims: tuple[int, ...] = ()
    fsdp: int = 0
    stage: int = 0


KINDS = {
    "rows": Kind((10, 7), "dense", (0,)),
    "rows_2": Kind((10, 7), "dense", (0,), stage=1),
    "rows_3": Kind((10, 7), "dense", (0,)),
    "tall": Kind((10, 4), "dense", (1,), stage=1),
    "odd_rows": Kind((9, 4), "dense", (0,)),  # tp gives 5 and 4; FSDP 4 inside gives 2 2 1 0 and 1 1 1 1
    "few_rows": Kind((3, 6), "dense", (0,), stage=1),
    "columns": Kind((10, 7), "dense", (1,)),  # the shape of `rows`, split otherwise
    "columns_2": Kind((2, 8), "dense", (1,), stage=1),
    "whole": Kind((5, 7), "whole"),
    "router": Kind((3, 7), "whole", stage=1),
    "norm": Kind((3,), "whole"),
    "embedding.weight": Kind((11, 4), "dense", (0,)),
    "w_up": Kind((6, 4, 7), "expert", (0, 1), stage=1),
    "w_down": Kind((6, 5, 6), "expert", (0, 2), stage=1),
    "split_up": Kind((4, 8, 6), "expert", (0, 1), fsdp=1, stage=1),
    "split_down": Kind((4, 8, 6), "expert", (0, 2), fsdp=1, stage=1),
    "lonely": Kind((1, 8, 4), "expert", (0, 2), fsdp=1, stage=1),  # one ep rank has it, all have a share of none
}
LAYOUTS = {
    # pp; dense: replicas, FSDP, tp; experts: replicas, FSDP, ep, etp
    "hsdp 2 fsdp 2 tp 2, experts 2 x 2 x 2": (1, (2, 2, 2), (1, 2, 2, 2)),
    "fsdp 4 tp 2, experts hsdp 2 x 4": (1, (1, 4, 2), (2, 1, 4, 1)),
    "fsdp 2 tp 4, experts 2 x 4": (1, (1, 2, 4), (1, 2, 1, 4)),
    "pp 2 fsdp 2 tp 2, experts 4": (2, (1, 2, 2), (1, 4, 1, 1)),
    "pp 2 fsdp 4 tp 1, experts 2 x 2": (2, (1, 4, 1), (1, 2, 1, 2)),
}
ON_FOUR = {
    "fsdp 2 tp 2, experts 2 x 2": (1, (1, 2, 2), (1, 2, 2, 1)),
    "pp 2 tp 2, experts etp 2": (2, (1, 1, 2), (1, 1, 1, 2)),
}


class Odd(nn.Module):
    """The parameters of some stages; each element of one has a value of its own."""

    def __init__(self, stages: tuple[int, ...] = (0, 1)):
        super().__init__()
        for name, kind in KINDS.items():
            if kind.stage in stages:
                owner: nn.Module = self
                if name == "embedding.weight":
                    self.embedding = owner = nn.Module()
                owner.register_parameter(name.rpartition(".")[2], nn.Parameter(distinct(kind.shape)))


def distinct(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape)


def gradient(name: str, seed: int) -> Tensor:
    return torch.randn(KINDS[name].shape, generator=torch.Generator().manual_seed(100 * list(KINDS).index(name) + seed))


def set_gradients(model: nn.Module, seed: int) -> None:
    for name, p in model.named_parameters():
        p.grad = mine_of(gradient(name, seed), p)


def mine_of(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole value, laid over ranks as `like` is."""
    if not isinstance(like, DTensor):
        return value.clone()
    part = value[rectangle(like).slices].contiguous()
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def laid_out(pp: int, dense: tuple[int, int, int], expert: tuple[int, int, int, int]) -> Odd:
    """This rank's stage of the model, every parameter split by its layer's own axes first and then by FSDP."""
    world = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("world",))
    views = {
        "dense": world._unflatten(0, (pp, *dense), ("pp", "rep", "fsdp", "tp")),
        "whole": world._unflatten(0, (pp, dense[0], dense[1] * dense[2]), ("wpp", "wrep", "wfsdp")),
        "expert": world._unflatten(0, (pp, *expert), ("epp", "erep", "efsdp", "ep", "etp")),
    }
    axes = {
        "dense": ("rep", "fsdp", ("tp",)),
        "whole": ("wrep", "wfsdp", ()),
        "expert": ("erep", "efsdp", ("ep", "etp")),
    }
    model = Odd(stages=(0, 1) if pp == 1 else (views["dense"].get_local_rank("pp"),))
    infos = {view: _info(views[view], *axes[view][:2]) for view in views}
    placed = {}
    for name, p in list(model.named_parameters()):
        kind = KINDS[name]
        mesh, own = views[kind.view], axes[kind.view][2]
        owner, last = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if own:
            p = nn.Parameter(distribute_tensor(p.detach(), mesh[own], [Shard(dim) for dim in kind.dims]))
            owner.register_parameter(last, p)
        placed[p] = ShardPlacementResult(Shard(kind.fsdp), infos[kind.view])
    fully_shard(model, mesh=views["whole"]["wfsdp"], shard_placement_fn=placed.__getitem__)
    return model


def _info(mesh: DeviceMesh, replicas: str, shards: str) -> FSDPMeshInfo:
    if mesh[replicas].size() > 1:
        return HSDPMeshInfo(mesh[replicas, shards], shard_mesh_dim=1, replicate_mesh_dim=0)
    return FSDPMeshInfo(mesh[shards], shard_mesh_dim=0)


Parts = dict[str, tuple[tuple[slice, ...], np.ndarray]]


def parts(tensors: dict[str, Tensor]) -> Parts:
    """This rank's parts by name, with their places; as arrays, which a process can leave behind."""
    return {
        name: (rectangle(t).slices, (t.to_local() if isinstance(t, DTensor) else t).detach().numpy().copy())
        for name, t in tensors.items()
    }


def assemble(of_ranks: list[Parts], name: str, shape: tuple[int, ...]) -> Tensor:
    """The whole tensor from all ranks' parts; every element is there, and replicas are the same bits."""
    whole, seen = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for rank, of_rank in enumerate(of_ranks):
        if name in of_rank and of_rank[name][1].size:
            slices, values = of_rank[name][0], torch.from_numpy(of_rank[name][1])
            old = seen[slices]
            assert torch.equal(whole[slices][old], values[old]), f"{name} on rank {rank} differs from its replica"
            whole[slices], seen[slices] = values, True
    assert seen.all(), f"nobody has some of {name}"
    return whole
