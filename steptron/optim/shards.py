"""A parameter as this rank holds it: plain tensors, and FSDP2's DTensors sharded by rows (with replicas under HSDP)."""

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing the tensor's storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def row_group(tensor: Tensor) -> ProcessGroup | None:
    """The ranks among which the tensor's rows are divided; None where this rank has them all."""
    if not isinstance(tensor, DTensor):
        return None
    sharded = [axis for axis, placement in enumerate(tensor.placements) if placement.is_shard()]
    assert len(sharded) <= 1, f"at most one axis shards a parameter: {tensor.placements}"
    if not sharded or tensor.device_mesh.size(sharded[0]) == 1:
        return None
    assert tensor.placements[sharded[0]].is_shard(dim=0), f"parameters are sharded by rows: {tensor.placements}"
    return tensor.device_mesh.get_group(sharded[0])


def rows_of(num_rows: int, rank: int, world_size: int) -> int:
    """Rows that DTensor gives to a rank: equal chunks, rounded up, the last ranks take what is left."""
    chunk = -(-num_rows // world_size)
    return max(0, min(chunk, num_rows - rank * chunk))
