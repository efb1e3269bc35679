"""What of a tensor this rank writes and reads: its rectangle of the whole, for tensors split in any of the project's ways.

torch.distributed.checkpoint counts the offsets of a doubly split dim as DTensor does, which is wrong for pieces of unequal sizes (see
`nn/rectangles.py`). Files, deduplication of replicas and resharding stay torch's.
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

from steptron.nn.local import local
from steptron.nn.rectangles import rectangle


class SavePlanner(DefaultSavePlanner):
    """Writes each tensor's rectangle; of ranks with the same one, torch lets one write it."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """One item for each tensor of which this rank holds a part."""
        self.plan = SavePlan([_write_item(name, t) for name, t in self.state_dict.items() if _has_part(t)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The values of an item."""
        return local(self.state_dict[index.fqn])


class LoadPlanner(DefaultLoadPlanner):
    """Reads each tensor's rectangle from whatever pieces the checkpoint has of it."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> LoadPlan:
        """Items for the overlaps of this rank's rectangles with the stored pieces."""
        assert self.metadata is not None, "torch hands over the metadata before it asks for a plan"
        items: list[ReadItem] = []
        for name, tensor in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata), f"{name} was checked to be a tensor"
            if _has_part(tensor):
                items += create_read_items_for_chunk_list(name, stored, [_chunk(tensor)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where an item's values go."""
        return local(self.state_dict[index.fqn])


def _has_part(tensor: Tensor) -> bool:
    """Whether this rank holds any element, or there are none to hold."""
    return rectangle(tensor).elements > 0 or tensor.numel() == 0


def _chunk(tensor: Tensor) -> ChunkStorageMetadata:
    mine = rectangle(tensor)
    assert mine.size == tuple(local(tensor).shape), f"a rank holds {tuple(local(tensor).shape)}, not its {mine}"
    return ChunkStorageMetadata(offsets=Size(mine.offset), sizes=Size(mine.size))


def _write_item(name: str, tensor: Tensor) -> WriteItem:
    chunk = _chunk(tensor)
    return WriteItem(
        index=MetadataIndex(name, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=chunk, properties=TensorProperties.create_from_tensor(local(tensor)), size=tensor.size()
        ),
    )
