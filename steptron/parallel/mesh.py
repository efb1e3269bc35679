"""The two device meshes over the same ranks: a list of all axes, and what each one splits.

dense view `(pp, dp_replicate, dp_shard, cp, tp)`: attention, dense FFN, norms, embeddings, output matrices
    pp            layers, in pipeline stages
    dp_replicate  replicas of the sharded dense parameters (HSDP)
    dp_shard      shards of the dense parameters (FSDP2); together with dp_replicate, the rows of a batch
    cp            pieces of a sequence; also shards of the dense parameters
    tp            heads, FFN columns, vocabulary rows; between them, slices of the sequence

expert view `(pp, edp_replicate, edp_shard, ep, etp)`: routed experts
    edp_replicate replicas of the sharded expert parameters
    edp_shard     shards of the expert parameters (FSDP2)
    ep            groups of experts; tokens travel by all-to-all
    etp           FFN columns of an expert

Both views cover all ranks and share only `pp`. The only rule between them: within a pipeline stage, their products are
equal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from steptron.config.schema import ParallelConfig
from steptron.errors import MeshError, neighbours
from steptron.torch_internals import flatten_mesh, join_meshes, split_mesh

DENSE_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT_AXES = ("pp", "edp_replicate", "edp_shard", "ep", "etp")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The size of every axis, with −1 resolved. The product of each view is `world_size`."""

    world_size: int
    dense: dict[str, int]
    expert: dict[str, int]

    @property
    def data_ranks(self) -> int:
        """Number of ranks that read different rows of a batch."""
        return self.dense["dp_replicate"] * self.dense["dp_shard"]


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """Device meshes of both views; `world` is the flat mesh from which they are cut.

    FSDP shards each parameter over one of the three `shard_…` meshes, depending on what else splits it. Such a mesh has
    one dim, preceded by a dim of replicas if there are any.
    """

    layout: Layout
    world: DeviceMesh
    dense: DeviceMesh
    expert: DeviceMesh
    row: DeviceMesh
    """cp × tp: the ranks that hold pieces of the same batch rows."""
    shard_split: DeviceMesh
    """dp_shard × cp: for parameters that tp splits."""
    shard_whole: DeviceMesh
    """dp_shard × cp × tp: for parameters that every tp rank uses completely.

    Gradients are thus summed over tp too, as they must be.
    """
    shard_expert: DeviceMesh
    """edp_shard: for routed experts."""


def resolve_layout(parallel: ParallelConfig, world_size: int) -> Layout:
    """Return the axis sizes for `world_size` ranks.

    Raises `MeshError` if the product of a view cannot be `world_size`.
    """
    views = [_resolve_view(axes, written_sizes(parallel, axes), world_size) for axes in (DENSE_AXES, EXPERT_AXES)]
    if views[0]["pp"] != views[1]["pp"]:
        raise MeshError(
            f"parallel.pp=-1 becomes {views[0]['pp']} with parallel.dense and {views[1]['pp']} with parallel.expert, "
            "but both views share it: set parallel.pp, or the axes of one view"
        )
    return Layout(world_size=world_size, dense=views[0], expert=views[1])


def build_meshes(layout: Layout, device_type: str) -> Meshes:
    """Return both views as device meshes. Requires an initialised process group of `layout.world_size` ranks."""
    assert dist.get_world_size() == layout.world_size, "the layout is for another number of ranks"
    world = init_device_mesh(device_type, (layout.world_size,), mesh_dim_names=("world",))
    dense, expert = (split_mesh(world, axes) for axes in (layout.dense, layout.expert))
    return Meshes(
        layout=layout,
        world=world,
        dense=dense,
        expert=expert,
        row=flatten_mesh(dense["cp", "tp"], "row"),
        shard_split=_with_replicas(dense, "dp_replicate", flatten_mesh(dense["dp_shard", "cp"], "shard_split")),
        shard_whole=_with_replicas(dense, "dp_replicate", flatten_mesh(dense["dp_shard", "cp", "tp"], "shard_whole")),
        shard_expert=_with_replicas(expert, "edp_replicate", expert["edp_shard"]),
    )


def data_rank(meshes: Meshes) -> int:
    """Return the index of the slice of a batch's rows that this rank reads, 0 … layout.data_ranks − 1."""
    mesh = meshes.dense
    return mesh.get_local_rank("dp_replicate") * meshes.layout.dense["dp_shard"] + mesh.get_local_rank("dp_shard")


def _with_replicas(view: DeviceMesh, axis: str, shards: DeviceMesh) -> DeviceMesh:
    return join_meshes([view[axis], shards]) if view[axis].size() > 1 else shards


def recipe_key(axis: str) -> str:
    """Return the recipe's key of an axis: `edp_shard` is `parallel.expert.dp_shard`."""
    if axis == "pp":
        return "parallel.pp"
    view = "dense" if axis in DENSE_AXES else "expert"
    return f"parallel.{view}.{axis_field(axis)}"


def written_layout(layout: Layout) -> list[str]:
    """Return the number of ranks and the axes above 1 of both views, as lines of text."""
    views = []
    for name, axes in (("dense", layout.dense), ("expert", layout.expert)):
        above = " · ".join(f"{axis_field(axis)} {size}" for axis, size in axes.items() if size > 1)
        views.append(f"  {name} view: {above or 'every axis 1'}")
    return [f"layout: {_ranks(layout.world_size)}", *views] if layout.world_size > 1 else ["layout: 1 rank"]


def axis_field(axis: str) -> str:
    """Return the name of an axis in its section of the recipe: `edp_shard` is `dp_shard` of `parallel.expert`."""
    return axis.removeprefix("e") if axis.startswith("edp") else axis


def written_sizes(parallel: ParallelConfig, axes: Sequence[str]) -> tuple[int, ...]:
    """Return the sizes of a view's axes as the recipe writes them; -1 is what is left of the ranks."""
    section = parallel.dense if axes == DENSE_AXES else parallel.expert
    return tuple(parallel.pp if axis == "pp" else getattr(section, axis_field(axis)) for axis in axes)


def _resolve_view(axes: tuple[str, ...], sizes: tuple[int, ...], world_size: int) -> dict[str, int]:
    above = [(axis, size) for axis, size in zip(axes, sizes, strict=True) if size != 1]
    view = recipe_key(axes[-1]).rpartition(".")[0]
    written = " × ".join(f"{recipe_key(axis)}={size}" for axis, size in above) or f"{view} with every axis 1"
    for axis, size in zip(axes, sizes, strict=True):
        if size < 1 and size != -1:
            raise MeshError(f"{recipe_key(axis)}={size} must be at least 1, or -1 for what is left of the ranks")
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1:
        raise MeshError(f"{written}: only one of them can be -1 (what is left of the ranks); set the others")
    if -1 in sizes:
        if world_size % known:
            raise MeshError(
                f"{written} needs a multiple of {known} ranks, there {_are(world_size)}; "
                f"start {_nearest_multiples(world_size, known)} ranks{_nearest_sizes(axes, sizes, world_size)}"
            )
        sizes = tuple(world_size // known if size == -1 else size for size in sizes)
    elif known != world_size:
        raise MeshError(
            f"{written} makes {_ranks(known)}, there {_are(world_size)}; "
            f"start {_ranks(known)}, set one axis of {view} to -1{_nearest_sizes(axes, sizes, world_size)}"
        )
    return dict(zip(axes, sizes, strict=True))


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _are(count: int) -> str:
    return f"{'are' if count > 1 else 'is'} {count}"


def _nearest_sizes(axes: tuple[str, ...], sizes: tuple[int, ...], world_size: int) -> str:
    """Return advice of the form `, or set …`, or "" if there is none.

    For each axis above 1, it names the nearest sizes that would make the view fit if only this axis changed.
    """
    rest, found = -1 in sizes, []
    for axis, size in zip(axes, sizes, strict=True):
        others = math.prod(s for s in sizes if s != -1) // size if size > 1 else 0
        if not others or world_size % others:
            continue
        left = world_size // others
        legal = [n for n in range(1, left + 1) if left % n == 0] if rest else [left]
        found.append(f"{recipe_key(axis)} to {' or '.join(map(str, neighbours(size, legal)))}")
    return f", or set {', or '.join(found)}" if found else ""


def _nearest_multiples(value: int, step: int) -> str:
    below, above = value // step * step, (value // step + 1) * step
    return f"{below} or {above}" if below else str(above)
