"""Load a checkpoint in place, whatever layout it was saved under. Nothing in its files is run as code."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from steptron.checkpoint.manifest import read_manifest
from steptron.checkpoint.metadata import read_metadata
from steptron.checkpoint.plan import LoadPlanner
from steptron.errors import CheckpointError

SHOWN = 3
"""The number of names that an error lists."""


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` (plain or sharded) from a complete checkpoint, in place. Ranks may give different names, all
    together.

    Raises `CheckpointError`, the same on all ranks, if names or shapes differ between both sides.
    """
    _read(path, tensors, _fit(path, tensors, whole=True))


def load_part(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` from a checkpoint that may hold more. Nothing else is read; values are rounded to the tensors'
    types.

    Raises `CheckpointError`, the same on all ranks, if a name is missing or a shape differs.
    """
    _read(path, tensors, _fit(path, tensors, whole=False))


class _Reader(FileSystemReader):
    """A reader of files that is given the description. torch's own reader would run any code that `.metadata` names."""

    def __init__(self, path: Path, metadata: Metadata):
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the tensors of the checkpoint, and where they are."""
        return replace(self._metadata, storage_meta=StorageMeta(load_id=self.load_id))


def _read(path: Path, tensors: dict[str, Tensor], metadata: Metadata) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            state_dict_loader.load(
                tensors,
                storage_reader=_Reader(path, metadata),
                planner=LoadPlanner(),
                no_dist=not dist.is_initialized(),
            )
        except CheckpointException as error:
            failure = str(next(iter(error.failures.values()))[0]).partition("\n")[0]
            raise CheckpointError(f"{path} cannot be read: {failure}") from error


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """The result of one rank's comparison of its tensors with the checkpoint."""

    unreadable: str | None = None
    misshapen: str | None = None
    lacking: tuple[str, ...] = ()
    """The names that the checkpoint lacks."""
    unasked: int = 0
    """A bit set: bit i is set if this rank does not want the checkpoint's i-th name."""


def _fit(path: Path, tensors: dict[str, Tensor], whole: bool) -> Metadata:
    """Compare names and shapes, and return the checkpoint's description.

    Ranks agree before any of them raises, so that none is left waiting for the others.
    """
    try:
        metadata = read_metadata(path, read_manifest(path))
        mine = _compare(path, metadata, tensors)
    except CheckpointError as error:
        metadata, mine = Metadata({}), _Fit(unreadable=str(error))
    fits = _gather(mine)
    _raise_first(fit.unreadable for fit in fits)
    _refuse("lacks", sorted({name for fit in fits for name in fit.lacking}), path)
    if whole:
        unasked = reduce(and_, (fit.unasked for fit in fits))
        names = sorted(metadata.state_dict_metadata)
        _refuse("has, and the model does not,", [name for i, name in enumerate(names) if unasked >> i & 1], path)
    _raise_first(fit.misshapen for fit in fits)
    return metadata


def _compare(path: Path, metadata: Metadata, tensors: dict[str, Tensor]) -> _Fit:
    """Return this rank's view of the checkpoint's names and shapes."""
    stored, misshapen = metadata.state_dict_metadata, None
    for name in sorted(tensors.keys() & stored.keys(), reverse=True):
        entry = stored[name]
        assert isinstance(entry, TensorStorageMetadata), "read_metadata refuses anything else"
        size, here = tuple(entry.size), tuple(tensors[name].shape)
        if size != here:
            misshapen = f"{path.name}: {name} is {size} there and {here} in the model"
    return _Fit(
        misshapen=misshapen,
        lacking=tuple(tensors.keys() - stored.keys()),
        unasked=sum(1 << i for i, name in enumerate(sorted(stored)) if name not in tensors),
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
