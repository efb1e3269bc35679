"""Which part of a whole parameter a rank holds: one rectangle, an offset and a size along every tensor dim.

A parameter may be split along several mesh axes, first by the layers' own (tensor, expert parallel), then inside each piece by FSDP.
DTensor calls the second kind of split a `_StridedShard` where both cut the same dim. Its own arithmetic (offsets, `full_tensor`) takes
equal pieces for granted there: 9 rows over tp 2 and then FSDP 4 come out on the wrong ranks. So offsets are counted here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard


@dataclass(frozen=True)
class Rectangle:
    """A contiguous part of a tensor; size 0 along a dim where the rank holds nothing."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Elements inside."""
        return prod(self.size)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this part in the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.size, strict=True))


def rectangle(tensor: Tensor) -> Rectangle:
    """This rank's part of a tensor; the whole of a plain one."""
    if not isinstance(tensor, DTensor):
        return Rectangle((0,) * tensor.ndim, tuple(tensor.shape))
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "a tensor is kept on ranks of its own mesh only"
    return rectangle_at(tuple(tensor.shape), tuple(tensor.device_mesh.shape), tensor.placements, coordinate)


def rectangle_at(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement], coordinate: Sequence[int]
) -> Rectangle:
    """The part of a tensor of this shape that the rank at `coordinate` of its mesh holds. Every split is `torch.chunk`'s."""
    offset, size = [0] * len(shape), list(shape)
    for axis in _split_order(placements):
        dim = placements[axis].dim  # pyright: ignore[reportAttributeAccessIssue]
        chunk = -(-size[dim] // mesh_shape[axis])
        start = min(coordinate[axis] * chunk, size[dim])
        offset[dim] += start
        size[dim] = min(chunk, size[dim] - start)
    return Rectangle(tuple(offset), tuple(size))


def _split_order(placements: Sequence[Placement]) -> list[int]:
    """Mesh axes that split, in the order they do: plain shards as they stand, then the strided ones, which cut what those left."""
    plain = [axis for axis, placement in enumerate(placements) if isinstance(placement, Shard)]
    strided = [axis for axis, placement in enumerate(placements) if isinstance(placement, _StridedShard)]
    for axis, placement in enumerate(placements):
        kept = axis in plain or axis in strided or isinstance(placement, Replicate)
        assert kept, f"a parameter is split or replicated, never partial: {placement}"
    return plain + strided[::-1]
