"""The choice of a checkpoint: the newest complete one of a run, or the one that a person names."""

import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from steptron.atomic import rename_durably
from steptron.checkpoint.coordinator import ALONE, Coordinator
from steptron.checkpoint.manifest import (
    ABANDONED,
    check_files,
    has_all_bytes,
    list_checkpoints,
    read_manifest,
    step_name,
    step_of,
)
from steptron.checkpoint.metadata import read_metadata
from steptron.checkpoint.remote import Remote, fetch
from steptron.errors import CheckpointError, typed

SHOWN = 3
"""The number of steps that an error names."""


def newest_complete(
    folder: Path, coordinator: Coordinator = ALONE, remote: Remote | None = None, before: int | None = None
) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint (of a step before `before`) whose files match its manifest, and why newer ones were
    skipped.

    `remote`: the mirror, from which a damaged checkpoint or a lost run is restored. All ranks call it.
    """
    skipped: list[str] = []

    def ours(steps: Iterable[int]) -> set[int]:
        return {step for step in steps if step >= 0 and (before is None or step < before)}

    here = ours(coordinator.from_first(lambda: [step_of(path) for path in list_checkpoints(folder)]))
    newest = max(here, default=None)
    if newest is not None and _is_complete(folder / step_name(newest), coordinator, skipped):
        return folder / step_name(newest), skipped
    # Later steps in the mirror belong to a past that the run has left.
    there = {step for step in ours(_steps(remote, coordinator, skipped)) if newest is None or step <= newest}
    for step in sorted(here | there, reverse=True):
        path = folder / step_name(step)
        if step in here and step != newest and _is_complete(path, coordinator, skipped):
            return path, skipped
        if remote and step in there and _brought_back(remote, step, folder, coordinator, skipped):
            return path, skipped
    return None, skipped


def _steps(remote: Remote | None, coordinator: Coordinator, skipped: list[str]) -> list[int]:
    """Return the steps in the mirror, or none if it does not answer."""
    try:
        return coordinator.from_first(remote.steps) if remote else []
    except CheckpointError as error:
        skipped.append(str(error))
        return []


def _is_complete(path: Path, coordinator: Coordinator, skipped: list[str]) -> bool:
    try:
        verify(path, coordinator)
    except CheckpointError as error:
        skipped.append(str(error))
        return False
    return True


def _brought_back(remote: Remote, step: int, folder: Path, coordinator: Coordinator, skipped: list[str]) -> bool:
    """Return whether the checkpoint of that step is complete in the mirror, and was restored from it."""
    try:
        path = fetch(remote, step, folder, coordinator)
    except CheckpointError as error:
        skipped.append(str(error))
        return False
    if not _is_complete(path, coordinator, skipped):
        return False
    skipped.append(f"{path.name} was restored from {remote.url}")
    return True


def find_complete(path: Path, coordinator: Coordinator = ALONE) -> Path:
    """Return the checkpoint that a person means by a run folder (its newest complete one) or by one of its checkpoints.

    Raises `CheckpointError` if there is none, or if the named one is not complete.
    """
    is_dir, is_run = coordinator.from_first(lambda: (path.is_dir(), (path / "checkpoints").is_dir()))
    if not is_dir:
        raise CheckpointError(f"{path}: no such folder; give a run folder or one of its checkpoints/step-… folders")
    if not is_run:
        verify(path, coordinator)
        return path
    found, skipped = newest_complete(path / "checkpoints", coordinator)
    if found is None:
        raise CheckpointError("; ".join([f"{path} has no complete checkpoint", *skipped]))
    return found


def named(folder: Path, step: int) -> Path:
    """Return the folder of that step's checkpoint. Raises `CheckpointError` with the nearest existing steps."""
    path = folder / step_name(step)
    if path.is_dir():
        return path
    steps = sorted((step_of(found) for found in list_checkpoints(folder)), key=lambda there: abs(there - step))
    nearest = f"nearest: {', '.join(map(str, sorted(steps[:SHOWN])))}" if steps else "there is none at all"
    raise CheckpointError(f"--step {step}: {folder} has no checkpoint of that step; {nearest}")


def way_back(run_dir: Path) -> str:
    """Return the last part of an error message: how to continue the run in `run_dir` from its checkpoints."""
    whole = (path for path in list_checkpoints(run_dir / "checkpoints") if has_all_bytes(path))
    newest = next(whole, None)
    if newest is None:
        return f"the run has no complete checkpoint yet, and {typed('resume', run_dir)} begins at its first step"
    earlier = [f"--step {step_of(path)}" for path in islice(whole, SHOWN - 1)]
    more = f", or from an earlier one with {' or '.join(earlier)}" if earlier else ""
    return f"{typed('resume', run_dir)} continues from {newest.name}, the newest complete checkpoint{more}"


def verify(path: Path, coordinator: Coordinator) -> None:
    """Check sizes and checksums, each rank a share of the files, and open the description as loading does.

    Raises `CheckpointError` on all ranks.
    """

    def open_() -> None:
        read_metadata(path, manifest)

    manifest = coordinator.from_first(lambda: read_manifest(path))
    coordinator.run_on_all_ranks(lambda: check_files(path, manifest, coordinator.share(sorted(manifest.files))))
    coordinator.from_first(open_)


def put_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints after `step`, because the run continues from there. They replace those put aside before.

    Raises `CheckpointError` if that fails.
    """
    try:
        for old in folder.glob(f"{ABANDONED}*"):
            shutil.rmtree(old)
        for path in list_checkpoints(folder):
            if step_of(path) > step:
                rename_durably(path, path.with_name(ABANDONED + path.name))
    except OSError as error:
        raise CheckpointError(
            f"{folder}: checkpoints after step {step} cannot be put aside: {error.strerror}; "
            f"remove them by hand, then {typed('resume', folder.parent)}"
        ) from error
