"""Write a checkpoint under a temporary name, and rename it when it is complete. Older checkpoints stay until then."""

import errno
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from steptron import __version__
from steptron.atomic import make_folder, rename_durably, sync_tree
from steptron.checkpoint.coordinator import Coordinator
from steptron.checkpoint.find import way_back
from steptron.checkpoint.manifest import (
    ABANDONED,
    FileEntry,
    Manifest,
    describe_file,
    has_all_bytes,
    step_name,
    step_of,
    write_manifest,
)
from steptron.checkpoint.metadata import read_metadata, write_metadata
from steptron.checkpoint.plan import SavePlanner
from steptron.checkpoint.retention import Retention
from steptron.checkpoint.staging import TensorPart
from steptron.errors import CheckpointError, SaveError
from steptron.origin import origin

FULL_BYTES = 1 << 20
"""The free bytes below which a disk counts as full."""


def save(
    folder: Path,
    *,
    step: int,
    pieces: Mapping[str, TensorPart],
    counters: dict[str, Any],
    recipe_hash: str,
    layout: dict[str, Any],
    keep: Retention,
    coordinator: Coordinator,
) -> Path:
    """Write `folder`/step-NNNNNNNN on all ranks, then remove those that `keep` lets go. Returns its path.

    `pieces`: parts of the tensors that this rank holds. Ranks may hold different ones, but one name is one tensor.

    Raises `SaveError` on all ranks if any of them cannot write: the temporary folder is removed, older checkpoints
    stay.
    """
    final, temporary = folder / step_name(step), folder / f".tmp-{step_name(step)}"

    def on_first(action: Callable[[], None]) -> None:
        coordinator.from_first(lambda: _or_save_error(folder, step, action))

    try:
        on_first(lambda: _prepare(folder, temporary))
        files = coordinator.run_on_all_ranks(
            lambda: _or_save_error(folder, step, lambda: _write(temporary, pieces, coordinator))
        )
        manifest = Manifest(
            step=step,
            counters=counters,
            recipe_hash=recipe_hash,
            layout=layout,
            torch=torch.__version__,
            steptron=__version__,
            files=_gather(files, coordinator),
            origin=origin() if coordinator.rank == 0 else {},
        )
        on_first(lambda: _commit(temporary, final, manifest))
    except SaveError:
        if coordinator.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if coordinator.rank == 0:
        _prune(final, keep)
    return final


def _prune(newest: Path, keep: Retention) -> None:
    """Remove checkpoints older than `newest` that are not kept. Incomplete ones are removed with those of their age.

    A folder of a later step is one that the run could not resume from; it is written anew when the run gets there.
    """
    older = [path for path in newest.parent.glob("step-*") if path.name < newest.name]
    whole = {step_of(path) for path in older if has_all_bytes(path)} | {step_of(newest)}
    stay, oldest_new = keep.chosen(whole), sorted(whole)[-keep.newest :][0]
    for path in older:
        step = step_of(path)
        if step not in stay and (step in whole or (step < oldest_new and len(whole) >= keep.newest)):
            shutil.rmtree(path, ignore_errors=True)


def _prepare(folder: Path, temporary: Path) -> None:
    for leftover in folder.glob(".tmp-step-*"):
        shutil.rmtree(leftover)
    make_folder(folder)
    temporary.mkdir()


class _Writer(FileSystemWriter):
    """A writer of files: torch's, with a description that every Python reads."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write `.metadata`, on the first rank, in place of torch's method, whose pickle depends on the Python."""
        metadata.storage_data = {result.index: result.storage_data for written in results for result in written}
        write_metadata(metadata, Path(self.path))


def _write(temporary: Path, pieces: Mapping[str, TensorPart], coordinator: Coordinator) -> dict[str, FileEntry]:
    """Write this rank's share of the tensors, and return its files by name."""
    writer = _Writer(temporary, sync_files=True, single_file_per_rank=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        state_dict_saver.save(
            dict(pieces),
            storage_writer=writer,
            planner=SavePlanner(),
            process_group=coordinator.group,
            no_dist=not dist.is_initialized(),
        )
    mine = (f"__{coordinator.rank}_", ".metadata") if coordinator.rank == 0 else f"__{coordinator.rank}_"
    return {path.name: describe_file(path) for path in sorted(temporary.iterdir()) if path.name.startswith(mine)}


def _gather(files: dict[str, FileEntry], coordinator: Coordinator) -> dict[str, FileEntry]:
    if not dist.is_initialized():
        return files
    by_rank: list[dict[str, FileEntry]] = [{}] * coordinator.ranks
    dist.all_gather_object(by_rank, files, group=coordinator.group)
    return {name: entry for entries in by_rank for name, entry in entries.items()}


def _commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    read_metadata(temporary, manifest)  # a checkpoint that cannot be loaded must not be published
    write_manifest(manifest, temporary)
    sync_tree(temporary)
    if final.exists():  # a damaged one of a step that the run has reached again
        aside = final.with_name(ABANDONED + final.name)
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    rename_durably(temporary, final)


def _or_save_error(folder: Path, step: int, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except (OSError, RuntimeError, CheckpointException) as error:
        raise SaveError(
            f"the checkpoint of step {step} cannot be written to {folder}: {_reason(error, folder)}; "
            f"free some space or repair the disk; {way_back(folder.parent)}"
        ) from error
    except CheckpointError as error:
        raise SaveError(
            f"the checkpoint of step {step} is not kept, because it could not be loaded: {error}; "
            f"checkpoints before it are complete: resume the run with another version of torch than {torch.__version__}"
        ) from error


def _reason(error: BaseException, folder: Path) -> str:
    """Return the operating system's error message from inside the exceptions in which torch has wrapped it."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    # torch's file writer hides the system's message, and an error from another rank has lost the exceptions inside it.
    if folder.exists() and shutil.disk_usage(folder).free < FULL_BYTES:
        return os.strerror(errno.ENOSPC)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
