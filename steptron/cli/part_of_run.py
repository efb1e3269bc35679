"""Refuse a path inside a run's folder where a command takes the folder, and show the command to type."""

from pathlib import Path

from steptron.checkpoint.manifest import step_of
from steptron.errors import SteptronError, typed

MARKS = ("ledger.jsonl", "metrics.jsonl", "checkpoints")
"""The names that mark a run folder: it holds a recipe.yaml and at least one of them."""


def refuse_part_of_run(path: Path, *words: object, step: str = "", more: tuple[str, ...] = ()) -> None:
    """Raise `SteptronError`, with the right command to type, if `path` is a part of a run's folder instead of the
    folder.

    `words`: the command up to the folder. `step`: its option for the step of a checkpoint, if it has one. `more`: the
    words after the folder.
    """
    run = next((parent for parent in (*path.parents, *path.absolute().parents) if _is_run(parent)), None)
    if run is None or _is_run(path):
        return
    steps = [step_of(part) for part in (path, *path.parents) if step_of(part) >= 0]
    option = (step, steps[0]) if step and steps else ()
    what = f"the checkpoint of step {steps[0]}" if steps else "a part"
    raise SteptronError(
        f"{path} is {what} of the run in {run}, and {typed(words[0])} takes the run's folder; "
        f"type {typed(*words, run, *option, *more)}"
    )


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() and any((folder / name).exists() for name in MARKS)
