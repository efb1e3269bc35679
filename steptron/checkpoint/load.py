"""Finds the newest whole checkpoint and loads it in place, whatever layout it was saved under."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import and_
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from steptron.checkpoint.manifest import check_files, check_sizes, read_manifest
from steptron.checkpoint.plan import LoadPlanner
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


def whole_before(folder: Path, step: int) -> Path | None:
    """The newest checkpoint of a step before `step` that has all its bytes. Checksums, which take long, are left to a resume."""
    for path in list_checkpoints(folder):
        try:
            manifest = read_manifest(path)
            if manifest.step < step:
                check_sizes(path, manifest)
                return path
        except CheckpointError:
            continue  # not whole: an older one serves
    return None


def find_whole(path: Path) -> Path:
    """The checkpoint that a person means by a run folder (its newest whole one) or by one of its checkpoints.

    Raises `CheckpointError` where there is none, or the one named is not whole."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run folder or one of its checkpoints/step-… folders")
    if not (path / "checkpoints").is_dir():
        check_files(path, read_manifest(path))
        return path
    found, skipped = newest_whole(path / "checkpoints")
    if found is None:
        raise CheckpointError("; ".join([f"{path} has no whole checkpoint", *skipped]))
    return found


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


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            state_dict_loader.load(
                tensors,
                storage_reader=FileSystemReader(path),
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
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
    except OSError as error:
        return [], _Fit(unreadable=f"{path} cannot be read: {error.strerror}")
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
