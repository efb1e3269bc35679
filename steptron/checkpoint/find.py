"""Which checkpoint: the newest whole one of a run, or the one that a person names."""

import shutil
from pathlib import Path

from steptron.checkpoint.manifest import (
    ABANDONED,
    check_files,
    check_sizes,
    list_checkpoints,
    read_manifest,
    step_name,
    step_of,
)
from steptron.checkpoint.place import Place, fetch
from steptron.checkpoint.team import ALONE, Team
from steptron.errors import CheckpointError

SHOWN = 3
"""Steps that an error names."""


def newest_whole(folder: Path, team: Team = ALONE, place: Place | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all what its manifest says, and why newer ones were passed over.

    `place`: where one that is damaged here, or the run of a lost disk, is brought back from."""
    skipped: list[str] = []
    here = team.from_first(lambda: list_checkpoints(folder))
    copies: list[int] | None = None
    for path in here:
        try:
            verify(path, team)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return path, skipped
        if place:
            copies = _steps(place, team, skipped) if copies is None else copies
            if step_of(path) in copies and (copy := _copy(place, step_of(path), folder, team, skipped)):
                return copy, skipped
    # Steps that only the place has are a run's that has lost its disk: one that went back keeps what it went back to.
    if place and not here:
        for step in _steps(place, team, skipped):
            if copy := _copy(place, step, folder, team, skipped):
                return copy, skipped
    return None, skipped


def _steps(place: Place, team: Team, skipped: list[str]) -> list[int]:
    """Steps that the second place has, newest first; none where it does not answer."""
    try:
        return team.from_first(place.steps)
    except CheckpointError as error:
        skipped.append(str(error))
        return []


def _copy(place: Place, step: int, folder: Path, team: Team, skipped: list[str]) -> Path | None:
    """That step's checkpoint from the second place, where it is whole."""
    try:
        path = fetch(place, step, folder, team)
        verify(path, team)
    except CheckpointError as error:
        skipped.append(str(error))
        return None
    skipped.append(f"{path.name} was brought back from {place.url}")
    return path


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


def find_whole(path: Path, team: Team = ALONE) -> Path:
    """The checkpoint that a person means by a run folder (its newest whole one) or by one of its checkpoints.

    Raises `CheckpointError` where there is none, or the one named is not whole."""
    is_dir, is_run = team.from_first(lambda: (path.is_dir(), (path / "checkpoints").is_dir()))
    if not is_dir:
        raise CheckpointError(f"{path}: no such folder; give a run folder or one of its checkpoints/step-… folders")
    if not is_run:
        verify(path, team)
        return path
    found, skipped = newest_whole(path / "checkpoints", team)
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
