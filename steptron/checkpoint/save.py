"""Writes a checkpoint under a temporary name and renames it when it is whole; what was there before stays until then."""

import errno
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from steptron.checkpoint.manifest import FileEntry, Manifest, check_sizes, describe_file, read_manifest, write_manifest
from steptron.checkpoint.plan import SavePlanner
from steptron.errors import CheckpointError, SaveError

Together = Callable[[Callable[[], Any]], Any]
"""Runs an action on all ranks and raises the first rank's `SteptronError` on all of them."""

FULL_BYTES = 1 << 20
"""A disk with less room than this is taken for full."""


def save(
    folder: Path,
    *,
    step: int,
    tensors: dict[str, Tensor],
    counters: dict[str, Any],
    recipe_hash: str,
    layout: dict[str, Any],
    keep: int,
    together: Together,
) -> Path:
    """Write `folder`/step-NNNNNNNN on all ranks, then remove older ones until `keep` are left. Returns its path.

    `tensors`: those this rank holds, plain or sharded; ranks may hold different ones, but what has one name is one tensor.

    Raises `SaveError` on all ranks when any cannot write: the temporary folder is removed, older checkpoints are untouched."""
    final, temporary = folder / f"step-{step:08d}", folder / f".tmp-step-{step:08d}"
    try:
        together(lambda: _on_first_rank(folder, step, lambda: _prepare(folder, temporary)))
        files = together(lambda: _or_save_error(folder, step, lambda: _write(temporary, tensors)))
        manifest = Manifest(
            step=step,
            counters=counters,
            recipe_hash=recipe_hash,
            layout=layout,
            torch=torch.__version__,
            files=_gather(files),
        )
        together(lambda: _on_first_rank(folder, step, lambda: _commit(temporary, final, manifest)))
    except SaveError:
        if _rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if _rank() == 0:
        _prune(final, keep)
    return final


def _prune(newest: Path, keep: int) -> None:
    """Remove what is older than `newest` and `keep` − 1 more that have all their bytes; those cut short do not count.

    A folder of a later step is one that the run could not resume from; it is written anew when the run gets there."""
    left = keep - 1
    for path in sorted(newest.parent.glob("step-*"), reverse=True):
        if path.name >= newest.name:
            continue
        if left == 0:
            shutil.rmtree(path, ignore_errors=True)
        elif _has_all_bytes(path):
            left -= 1


def _has_all_bytes(path: Path) -> bool:
    try:
        check_sizes(path, read_manifest(path))
    except CheckpointError:
        return False
    return True


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _prepare(folder: Path, temporary: Path) -> None:
    for leftover in folder.glob(".tmp-step-*"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)


def _write(temporary: Path, tensors: dict[str, Tensor]) -> dict[str, FileEntry]:
    """This rank's share of the tensors; what this rank has written, by file name."""
    writer = FileSystemWriter(temporary, sync_files=True, single_file_per_rank=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        state_dict_saver.save(tensors, storage_writer=writer, planner=SavePlanner(), no_dist=not dist.is_initialized())
    mine = (f"__{_rank()}_", ".metadata") if _rank() == 0 else f"__{_rank()}_"
    return {path.name: describe_file(path) for path in sorted(temporary.iterdir()) if path.name.startswith(mine)}


def _gather(files: dict[str, FileEntry]) -> dict[str, FileEntry]:
    if not dist.is_initialized():
        return files
    by_rank: list[dict[str, FileEntry]] = [{}] * dist.get_world_size()
    dist.all_gather_object(by_rank, files)
    return {name: entry for entries in by_rank for name, entry in entries.items()}


def _commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    write_manifest(manifest, temporary)
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    if final.exists():  # a damaged one that the run has gone past again
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _on_first_rank(folder: Path, step: int, action: Callable[[], None]) -> None:
    if _rank() == 0:
        _or_save_error(folder, step, action)


def _or_save_error(folder: Path, step: int, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except (OSError, RuntimeError, CheckpointException) as error:
        raise SaveError(
            f"the checkpoint of step {step} cannot be written to {folder}: {_reason(error, folder)}; "
            "checkpoints before it are whole: make room or mend the disk, then resume the run"
        ) from error


def _reason(error: BaseException, folder: Path) -> str:
    """The operating system's own word for what went wrong, from inside whatever torch has wrapped around it."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    # torch's file writer wraps the system's word, and what comes from another rank has lost what it wrapped.
    if folder.exists() and shutil.disk_usage(folder).free < FULL_BYTES:
        return os.strerror(errno.ENOSPC)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
