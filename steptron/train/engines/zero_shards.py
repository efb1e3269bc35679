"""The positions of a parameter's elements in ZeRO's vectors, and the way to the shards of a checkpoint and back.

    ZeRO        flat vectors on each rank, with stretches of many parameters, which begin and end anywhere in them
    checkpoint  rows (dim 0) on each rank, as in native training

    stretch or rows of each rank ─ join: sum over the ranks that share the parameter ─► whole ─► rows or stretch

One parameter at a time is whole, so that memory is needed for only one. "Whole" means what a rank computes with. Under
expert parallelism these are the experts of its ep rank, which the ranks of `edp_shard` share.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from steptron.nn.shard_geometry import rectangle, rectangle_at
from steptron.nn.to_local import local
from steptron.parallel.mesh import Meshes
from steptron.torch_internals import strided_shard


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Consecutive elements of one parameter that this rank updates. There may be none."""

    flat: Tensor
    """The fp32 vector that contains them: the optimizer's parameter, and the key to its state."""
    start: int = 0
    """The index of the first one in `flat`."""
    offset: int = 0
    """The index of the first one in the parameter."""
    elements: int = 0
    """The number of elements."""
    gradient: Callable[[], Tensor | None] = lambda: None
    """A function that returns their gradient, summed over ranks, between backward and update."""

    def of(self, flat: Tensor) -> Tensor:
        """Return these elements of `flat`, or of a vector of the optimizer's state for it, as a view."""
        return flat.detach()[self.start : self.start + self.elements]


def find_stretches(zero: Any, stage: int) -> Iterator[tuple[Tensor, Stretch]]:
    """Yield every parameter of a ZeRO optimizer with the stretch on this rank."""
    return _of_parameters(zero) if stage == 3 else _of_partitions(zero)


def _of_partitions(zero: Any) -> Iterator[tuple[Tensor, Stretch]]:
    """Yield those of ZeRO 1 and 2: a group's parameters are put end to end, and that vector is cut into one part per
    rank."""
    for i, flat in enumerate(zero.single_partition_of_fp32_groups):
        found = {id(p): Stretch(flat=flat) for p in zero.bit16_groups[i]}
        start, offset = 0, zero.first_offset[i]
        for n, p in enumerate(zero.params_in_partition[i]):
            elements = min(p.numel() - offset, flat.numel() - start)
            gradient = partial(_gradient, zero, i, n, elements)
            found[id(p)] = Stretch(flat=flat, start=start, offset=offset, elements=elements, gradient=gradient)
            start, offset = start + elements, 0
        yield from ((p, found[id(p)]) for p in zero.bit16_groups[i])


def _of_parameters(zero: Any) -> Iterator[tuple[Tensor, Stretch]]:
    """Yield those of ZeRO 3: every parameter is cut into one part per rank, and each rank puts its parts end to end."""
    for i, group in enumerate(zero.fp16_groups):
        flat = zero.fp32_partitioned_groups_flat[i]
        for n, p in enumerate(group):
            _, start, share = zero.grad_position[zero.get_param_id(p)]
            offset = min(dist.get_rank() * share, p.ds_numel)
            elements = min(share, p.ds_numel - offset)
            gradient = partial(_gradient, zero, i, n, elements)
            yield p, Stretch(flat=flat, start=start, offset=offset, elements=elements, gradient=gradient)


def _gradient(zero: Any, group: int, number: int, elements: int) -> Tensor | None:
    gradients = zero.averaged_gradients.get(group)
    return None if gradients is None else gradients[number].flatten()[:elements]


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """The layout of a parameter over ranks: whole or by expert for computing, by rows in a checkpoint."""

    shape: torch.Size
    """The shape that a rank computes with."""
    mesh: DeviceMesh
    """The ranks that hold the parameter."""
    computed: tuple[Placement, ...]
    """The placements on `mesh` of what a rank computes with."""
    saved: tuple[Placement, ...]
    """The placements on `mesh` of what a rank saves."""
    group: ProcessGroup
    """The ranks that compute with the same elements."""

    @classmethod
    def find(cls, parameter: Tensor, expert: bool, meshes: Meshes) -> "ShardLayout":
        """Return the layout of a parameter. `parameter`: as this rank computes with it."""
        ep = meshes.layout.expert["ep"]
        if expert and ep > 1:
            mesh = meshes.expert["edp_shard", "ep"]
            return cls(
                shape=parameter.shape,
                mesh=mesh,
                computed=(Replicate(), Shard(0)),
                saved=(strided_shard(0, ep), Shard(0)),
                group=mesh.get_group("edp_shard"),
            )
        mesh = meshes.shard_whole
        return cls(shape=parameter.shape, mesh=mesh, computed=(Replicate(),), saved=(Shard(0),), group=mesh.get_group())

    @property
    def whole(self) -> torch.Size:
        """Return the shape over all ranks."""
        experts = self.shape[0] * (self.mesh["ep"].size() if self.mesh.ndim == 2 else 1)
        return torch.Size((experts, *self.shape[1:]))

    def as_computed(self, block: Tensor) -> Tensor:
        """Return what this rank computes with, as a sharded tensor that shares its memory."""
        return self._part(block, self.computed)

    def rows_of(self, block: Tensor) -> Tensor:
        """Return a copy of what this rank saves of it."""
        return self._part(block[self._rows()].clone(), self.saved)

    def empty_rows(self, device: torch.device) -> Tensor:
        """Return an empty fp32 tensor for what this rank saves."""
        rows = self._rows()
        return self._part(torch.empty(rows.stop - rows.start, *self.shape[1:], device=device), self.saved)

    def join_rows(self, rows: Tensor) -> Tensor:
        """Return what this rank computes with, from the rows that each rank saves."""
        per_row = self.shape.numel() // self.shape[0]
        return self.join(local(rows).flatten(), self._rows().start * per_row)

    def join(self, values: Tensor, offset: int) -> Tensor:
        """Return what this rank computes with, fp32, from stretches. This rank has the elements from `offset` on."""
        whole = torch.zeros(self.shape.numel(), device=values.device)
        whole[offset : offset + values.numel()] = values
        # The bits are added as integers, which is exact. As floats, 0.0 + -0.0 would lose the sign.
        dist.all_reduce(whole.view(torch.int32), group=self.group)
        return whole.view(self.shape)

    def _rows(self) -> slice:
        coordinate = self.mesh.get_coordinate()
        assert coordinate is not None, "all ranks are in the mesh"
        shape = tuple(self.mesh.shape)
        mine = rectangle_at(self.whole, shape, self.saved, coordinate)
        first = mine.offset[0] - rectangle_at(self.whole, shape, self.computed, coordinate).offset[0]
        return slice(first, first + mine.size[0])

    def _part(self, values: Tensor, placements: tuple[Placement, ...]) -> Tensor:
        strides = torch.empty(self.whole, device="meta").stride()
        return DTensor.from_local(
            values.detach(), self.mesh, placements, run_check=False, shape=self.whole, stride=strides
        )


def flat_part(stretch: Stretch, place: ShardLayout) -> Tensor:
    """Return a stretch of ZeRO 3 as a part of the flattened parameter, sharing its memory."""
    values, elements = stretch.of(stretch.flat), place.shape.numel()
    part = DTensor.from_local(
        values, place.mesh, (Shard(0),), run_check=False, shape=torch.Size((elements,)), stride=(1,)
    )
    mine = rectangle(part)
    assert (mine.offset[0], mine.elements) == (stretch.offset, stretch.elements) or not stretch.elements, (
        f"ZeRO 3 cuts as torch.chunk does: {mine}, {stretch}"
    )
    return part
