"""The distribution of a parameter's matrices over ranks: the ranks that hold a piece of each, and their pieces.

A parameter is one matrix [R, C] or a stack of them [E, R, C]. Mesh axes that split dim E leave whole matrices on a
rank. Only those that split rows or columns make ranks depend on each other.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from steptron.nn.shard_geometry import Rectangle, rectangle_at


@dataclass(frozen=True)
class Split:
    """One matrix [R, C] over the ranks of a group."""

    shape: tuple[int, int]
    """The shape R, C of the whole matrix."""
    group: ProcessGroup | None
    """The ranks that hold pieces of it. None if one rank has it all."""
    pieces: tuple[Rectangle, ...]
    """The piece of each rank, in the group's order."""


def split_matrices(parameters: dict[str, Tensor]) -> dict[str, Split]:
    """Return the split of each parameter's matrices. All ranks must call it together: it makes the missing process
    groups.

    Ranks may have other parameters (pipeline stages), but those of one group have the same.
    """
    axes = {name: _matrix_axes(p) for name, p in parameters.items()}
    meshes = {p.device_mesh for p in parameters.values() if isinstance(p, DTensor)}
    ranks = {mesh: mesh.mesh for mesh in meshes}
    members = {name: _members(p, axes[name], ranks) for name, p in parameters.items()}
    groups = _new_groups(members[name] for name in parameters if len(axes[name]) > 1)
    splits = {}
    for name, p in parameters.items():
        shape = (p.shape[-2], p.shape[-1])
        if not isinstance(p, DTensor) or not axes[name]:
            splits[name] = Split(shape, None, (Rectangle((0, 0), shape),))
            continue
        one_axis = len(axes[name]) == 1
        group = p.device_mesh.get_group(axes[name][0]) if one_axis else groups[tuple(sorted(members[name]))]
        pieces = tuple(_piece(p, members[name][rank]) for rank in dist.get_process_group_ranks(group))
        splits[name] = Split(shape, group, pieces)
    return splits


def _matrix_axes(p: Tensor) -> list[int]:
    """Return the mesh axes that split rows or columns."""
    if not isinstance(p, DTensor):
        return []
    return [
        axis
        for axis, placement in enumerate(p.placements)
        if not placement.is_replicate()
        and placement.dim >= p.ndim - 2  # pyright: ignore[reportAttributeAccessIssue]
        and p.device_mesh.size(axis) > 1
    ]


def _members(p: Tensor, axes: list[int], ranks: dict[DeviceMesh, Tensor]) -> dict[int, tuple[int, ...]]:
    """Return global rank → mesh coordinate of the ranks that differ from this one along `axes` only.

    `ranks`: the global ranks of each mesh, which torch computes anew whenever they are read.
    """
    if not isinstance(p, DTensor):
        return {}
    mine = p.device_mesh.get_coordinate()
    assert mine is not None, "a parameter is kept on ranks of its own mesh only"
    ranges = [range(p.device_mesh.size(axis)) if axis in axes else (mine[axis],) for axis in range(p.device_mesh.ndim)]
    return {int(ranks[p.device_mesh][coordinate]): coordinate for coordinate in product(*ranges)}


def _piece(p: DTensor, coordinate: tuple[int, ...]) -> Rectangle:
    piece = rectangle_at(tuple(p.shape), tuple(p.device_mesh.shape), p.placements, coordinate)
    return Rectangle(piece.offset[-2:], piece.size[-2:])


def _new_groups(members: Iterable[Iterable[int]]) -> dict[tuple[int, ...], ProcessGroup]:
    """Make a group for every set of ranks that any rank names, and return those that this rank is in, by their ranks.

    All ranks must take part in making a group, in one order, while a rank knows its own sets only. So the sets are
    gathered first.
    """
    if not dist.is_initialized():
        return {}
    wanted: list[set[tuple[int, ...]]] = [set()] * dist.get_world_size()
    dist.all_gather_object(wanted, {tuple(sorted(ranks)) for ranks in members})
    made = {ranks: dist.new_group(list(ranks)) for ranks in sorted(set().union(*wanted))}
    return {ranks: group for ranks, group in made.items() if isinstance(group, ProcessGroup)}
