"""The remote folder that a run's checkpoints are mirrored to."""

from pathlib import Path

from steptron.checkpoint.remote import Remote
from steptron.config.identity import Identity
from steptron.errors import CheckpointError, RecipeError, typed


def mirror_remote(mirror_to: str, run_name: str) -> Remote | None:
    """Return the mirror of a run, or None if it has none.

    It is a folder of the run's name in `mirror_to`, so that runs of one recipe do not share it.
    """
    return Remote(f"{mirror_to.rstrip('/')}/{run_name}") if mirror_to else None


def refuse_mirror_of_another_run(mirror_to: str, run_name: str, folder: Path, ours: Identity, new: bool) -> None:
    """Raise `RecipeError` if the mirror holds checkpoints of another run: the first copy would remove the later ones.

    A new run is also refused if the mirror does not answer (`CheckpointError`). A run that continues then goes without
    a mirror for now.
    """
    remote = mirror_remote(mirror_to, run_name)
    if remote is None:
        return
    try:
        steps, owner = remote.steps(), remote.owner()
    except CheckpointError:
        if new:
            raise
        return
    if not steps or owner == ours.id or not (owner or new or ours.copy_of):
        return
    problem = f"checkpoint.mirror_to={mirror_to}: {remote.url} holds another run's checkpoints, up to step {steps[0]}"
    if not new and not ours.copy_of:
        raise RecipeError(f"{problem}; give another place, or a folder in it that is empty")
    if ours.copy_of:
        raise RecipeError(
            f"{problem}, and {folder} is a copy of a run's folder; give the copy another name: "
            f"{typed('resume', folder, 'run.name=NAME')}"
        )
    raise RecipeError(
        f"{problem}; continue it with {typed('resume', folder, '--from', remote.url)}, or give another run.name or "
        "another place"
    )
