"""The part of a tensor that this rank writes and reads: its rectangle of the whole, for tensors split in any way.

torch.distributed.checkpoint counts the offsets of a doubly split dim as DTensor does, which is wrong for pieces of
unequal sizes (see `nn/shard_geometry.py`). Files, deduplication of replicas and resharding stay torch's.
"""

from torch import Size, Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from steptron.checkpoint.staging import TensorPart, piece
from steptron.nn.to_local import local


class SavePlanner(DefaultSavePlanner):
    """A planner that writes this rank's pieces. Its state dict is name → `TensorPart`.

    If several ranks hold the same piece, torch lets one of them write it.
    """

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """Return one item for each tensor of which this rank holds a part."""
        self.plan = SavePlan([_write_item(name, p) for name, p in self.state_dict.items() if _has_part(p)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the values of an item."""
        return self.state_dict[index.fqn].values


class LoadPlanner(DefaultLoadPlanner):
    """A planner that reads each tensor's rectangle from the pieces of the checkpoint. Its state dict is name →
    tensor."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> LoadPlan:
        """Return items for the overlaps of this rank's rectangles with the stored pieces."""
        assert self.metadata is not None, "torch hands over the metadata before it asks for a plan"
        items: list[ReadItem] = []
        for name, tensor in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata), f"{name} was checked to be a tensor"
            mine = piece(tensor)
            if _has_part(mine):
                items += create_read_items_for_chunk_list(name, stored, [_chunk(mine)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the tensor that receives an item's values."""
        return local(self.state_dict[index.fqn])


def _has_part(mine: TensorPart) -> bool:
    """Return whether this rank holds any element, or the tensor has none."""
    return mine.rectangle.elements > 0 or mine.shape.numel() == 0


def _chunk(mine: TensorPart) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=Size(mine.rectangle.offset), sizes=Size(mine.rectangle.size))


def _write_item(name: str, mine: TensorPart) -> WriteItem:
    chunk = _chunk(mine)
    return WriteItem(
        index=MetadataIndex(name, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=chunk, properties=TensorProperties.create_from_tensor(mine.values), size=mine.shape
        ),
    )
