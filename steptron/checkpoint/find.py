"""Which checkpoint: the newest whole one of a run, or the one that a person names."""

import shutil
from pathlib import Path

from steptron.checkpoint.manifest import ABANDONED, check_files, check_sizes, read_manifest, step_name, step_of
from steptron.checkpoint.team import Team
from steptron.errors import CheckpointError

SHOWN = 3
"""Steps that an error names."""


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


def named(folder: Path, step: int) -> Path:
    """The folder of that step's checkpoint. Raises `CheckpointError` with the nearest steps that there are."""
    path = folder / step_name(step)
    if path.is_dir():
        return path
    steps = sorted((step_of(found) for found in list_checkpoints(folder)), key=lambda there: abs(there - step))
    nearest = f"nearest: {', '.join(map(str, sorted(steps[:SHOWN])))}" if steps else "there is none at all"
    raise CheckpointError(f"--step {step}: {folder} has no checkpoint of that step; {nearest}")


def verify(path: Path, team: Team) -> None:
    """Check sizes and checksums, each rank a share of the files. Raises `CheckpointError` on all ranks."""
    manifest = team.from_first(lambda: read_manifest(path))
    team.together(lambda: check_files(path, manifest, team.share(sorted(manifest.files))))


def put_aside(folder: Path, step: int) -> None:
    """Rename checkpoints after `step`: the run goes on from there. They take the place of those put aside before.

    Raises `CheckpointError` where that cannot be done."""
    try:
        for old in folder.glob(f"{ABANDONED}*"):
            shutil.rmtree(old)
        for path in list_checkpoints(folder):
            if step_of(path) > step:
                path.rename(path.with_name(ABANDONED + path.name))
    except OSError as error:
        raise CheckpointError(
            f"{folder}: checkpoints after step {step} cannot be put aside: {error.strerror}; remove them by hand, then `steptron resume`"
        ) from error
