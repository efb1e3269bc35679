"""The part of a parameter that a rank holds: one rectangle, with an offset and a size along every tensor dim.

A parameter may be split along several mesh axes: first by tensor or expert parallelism, then within each piece by FSDP.
If both split the same dim, DTensor calls the second split a `_StridedShard`. DTensor's own arithmetic (offsets,
`full_tensor`) then assumes equal pieces: with 9 rows over tp 2 and FSDP 4, it puts rows on the wrong ranks. So the
offsets are computed here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from steptron.torch_internals import is_strided


@dataclass(frozen=True)
class Rectangle:
    """A contiguous part of a tensor; the size along a dim is 0 if the rank holds nothing."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements in the rectangle."""
        return prod(self.size)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of the rectangle in the full tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.size, strict=True))


def rectangle(tensor: Tensor) -> Rectangle:
    """Return this rank's part of a tensor; all of it for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return Rectangle((0,) * tensor.ndim, tuple(tensor.shape))
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the tensor's mesh"
    return rectangle_at(tuple(tensor.shape), tuple(tensor.device_mesh.shape), tensor.placements, coordinate)


def rectangle_at(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement], coordinate: Sequence[int]
) -> Rectangle:
    """Return the part of a tensor of this shape that the rank at `coordinate` of the mesh holds.

    Every split cuts like `torch.chunk`: equal pieces, with smaller or empty ones at the end.
    """
    offset, size = [0] * len(shape), list(shape)
    for axis in _split_order(placements):
        dim = placements[axis].dim  # pyright: ignore[reportAttributeAccessIssue]
        chunk = -(-size[dim] // mesh_shape[axis])
        start = min(coordinate[axis] * chunk, size[dim])
        offset[dim] += start
        size[dim] = min(chunk, size[dim] - start)
    return Rectangle(tuple(offset), tuple(size))


def _split_order(placements: Sequence[Placement]) -> list[int]:
    """Return the mesh axes that split the tensor, in the order in which they split it.

    Plain shards split first, in mesh order. Strided shards then split the remaining pieces, in reverse order.
    """
    plain = [
        axis for axis, placement in enumerate(placements) if isinstance(placement, Shard) and not is_strided(placement)
    ]
    strided = [axis for axis, placement in enumerate(placements) if is_strided(placement)]
    for axis, placement in enumerate(placements):
        kept = axis in plain or axis in strided or isinstance(placement, Replicate)
        assert kept, f"a parameter must be split or replicated, not {placement}"
    return plain + strided[::-1]
