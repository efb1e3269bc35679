"""Loads a checkpoint in place, whatever layout it was saved under. Nothing in its files is run as code."""

import pickle
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from steptron.checkpoint.plan import LoadPlanner
from steptron.errors import CheckpointError

_PLAIN = {
    "pathlib": {"PosixPath", "PurePosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""Module → what torch's `.metadata`, a pickle, may name."""

SHOWN = 3
"""Names that an error lists of many."""


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` (plain or sharded) from a whole checkpoint, in place. Ranks may give different names: together they give all.

    Raises `CheckpointError`, the same on all ranks, where names or shapes are not the same on both sides."""
    _fit(path, tensors, whole=True)
    _read(path, tensors)


def load_part(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` from a checkpoint that may hold more, reading nothing else; values are rounded to the tensors' types.

    Raises `CheckpointError`, the same on all ranks, where a name is missing or a shape is another one."""
    _fit(path, tensors, whole=False)
    _read(path, tensors)


class _PlainUnpickler(pickle.Unpickler):
    """Makes descriptions of tensors and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        """The class, or the data type, that the pickle names."""
        if name in _PLAIN.get(module, ()):
            return super().find_class(module, name)
        found = super().find_class(module, name) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no description of tensors does")


class _Reader(FileSystemReader):
    """torch's, which would run whatever code `.metadata` asks for; tensors it reads as plain data already."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What tensors there are, and where. Raises `pickle.UnpicklingError`."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _PlainUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            state_dict_loader.load(
                tensors,
                storage_reader=_Reader(path),
                planner=LoadPlanner(),
                no_dist=not dist.is_initialized(),
            )
        except CheckpointException as error:
            failure = str(next(iter(error.failures.values()))[0]).partition("\n")[0]
            raise CheckpointError(f"{path} cannot be read: {failure}") from error


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """What one rank finds when it compares its tensors with the checkpoint."""

    unreadable: str | None = None
    misshapen: str | None = None
    lacking: tuple[str, ...] = ()
    """Names that the checkpoint lacks."""
    unasked: int = 0
    """Bit i is set where this rank does not want the checkpoint's i-th name."""


def _fit(path: Path, tensors: dict[str, Tensor], whole: bool) -> None:
    """Compare names and shapes. Ranks agree before any raises, so that none is left waiting for the others."""
    names, mine = _compare(path, tensors)
    fits = _gather(mine)
    _raise_first(fit.unreadable for fit in fits)
    _refuse("lacks", sorted({name for fit in fits for name in fit.lacking}), path)
    if whole:
        unasked = reduce(and_, (fit.unasked for fit in fits))
        _refuse("has, and the model does not,", [name for i, name in enumerate(names) if unasked >> i & 1], path)
    _raise_first(fit.misshapen for fit in fits)


def _compare(path: Path, tensors: dict[str, Tensor]) -> tuple[list[str], _Fit]:
    """The checkpoint's names in order, and this rank's view of them."""
    try:
        stored = _Reader(path).read_metadata().state_dict_metadata
    except OSError as error:
        return [], _Fit(unreadable=f"{path} cannot be read: {error.strerror}")
    except pickle.UnpicklingError as error:
        return [], _Fit(unreadable=f"{path / '.metadata'} cannot be read: {error}")
    names, misshapen = sorted(stored), None
    for name in sorted(tensors.keys() & stored.keys(), reverse=True):
        entry = stored[name]
        size = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        if size != tuple(tensors[name].shape):
            misshapen = f"{path.name}: {name} is {size} there and {tuple(tensors[name].shape)} in the model"
    return names, _Fit(
        misshapen=misshapen,
        lacking=tuple(tensors.keys() - stored.keys()),
        unasked=sum(1 << i for i, name in enumerate(names) if name not in tensors),
    )


def _raise_first(messages: Iterable[str | None]) -> None:
    for message in messages:
        if message is not None:
            raise CheckpointError(message)


def _gather(fit: _Fit) -> list[_Fit]:
    if not dist.is_initialized():
        return [fit]
    fits = [fit] * dist.get_world_size()
    dist.all_gather_object(fits, fit)
    return fits


def _refuse(what: str, names: list[str], path: Path) -> None:
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise CheckpointError(f"{path.name} {what} {', '.join(names[:SHOWN])}{more}")
