"""Finds the newest whole checkpoint and loads it in place, whatever layout it was saved under."""

from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from steptron.checkpoint.manifest import check_files, read_manifest
from steptron.errors import CheckpointError

SHOWN = 3
"""Names that an error lists of many."""


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders of checkpoints, newest first, whole or not."""
    return sorted(folder.glob("step-*"), reverse=True)


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all what its manifest says, and why newer ones were passed over."""
    skipped = []
    for path in list_checkpoints(folder):
        try:
            check_files(path, read_manifest(path))
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return path, skipped
    return None, skipped


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` (plain or sharded) from a whole checkpoint, in place.

    Raises `CheckpointError` where names or shapes are not the same on both sides."""
    reader = dcp.FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    _compare("lacks", sorted(set(tensors) - set(stored)), path)
    _compare("has, and the model does not,", sorted(set(stored) - set(tensors)), path)
    for name, tensor in tensors.items():
        entry = stored[name]
        size = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        if size != tuple(tensor.shape):
            raise CheckpointError(f"{path.name}: {name} is {size} there and {tuple(tensor.shape)} in the model")
    dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def _compare(what: str, names: list[str], path: Path) -> None:
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise CheckpointError(f"{path.name} {what} {', '.join(names[:SHOWN])}{more}")
