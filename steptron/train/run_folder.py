"""The run folder: where it is, whether it holds a run already, and the two files that describe the run."""

from pathlib import Path

from steptron.atomic import atomic_write, make_folder
from steptron.checkpoint.manifest import ABANDONED, list_checkpoints
from steptron.config import identity
from steptron.config.identity import Identity
from steptron.config.resolve import to_yaml
from steptron.config.schema import Recipe, RunConfig
from steptron.errors import RecipeError
from steptron.monitor.sinks import metrics_jsonl
from steptron.monitor.storage import ledger


def run_dir(run: RunConfig) -> Path:
    """Return the run folder, `runs/NAME` unless the recipe names another."""
    return Path(run.dir or f"runs/{run.name}")


def holds_run(folder: Path) -> bool:
    """Return whether `folder` holds a step or a checkpoint that a new run there would lose.

    A start that failed before its first step leaves neither. Call this while the lock is held.
    """
    if not (folder / "recipe.yaml").is_file():
        return False
    metrics, checkpoints = folder / metrics_jsonl.FILE_NAME, folder / "checkpoints"
    return (
        (metrics.is_file() and metrics.stat().st_size > 0)
        or bool(list_checkpoints(checkpoints))
        or any(checkpoints.glob(f"{ABANDONED}*"))
        or bool(ledger.read(folder, "checkpoint", "rewind"))  # a folder restored from a mirror has nothing else
    )


def make_run_dir(folder: Path) -> None:
    """Create the run folder. Raises `RecipeError` if that fails."""
    try:
        make_folder(folder)
    except OSError as error:
        raise not_writable(folder, error) from error


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write `recipe.yaml` into the run folder, complete or not at all. Raises `RecipeError` if that fails."""
    _write(folder, "recipe.yaml", to_yaml(recipe))


def write_identity(ours: Identity, folder: Path) -> None:
    """Write `run.json` into the run folder, complete or not at all. Raises `RecipeError` if that fails."""
    _write(folder, identity.NAME, ours.to_json())


def not_writable(folder: Path, error: OSError) -> RecipeError:
    """Return the error for a run folder that cannot be written."""
    return RecipeError(
        f"run.dir={folder} cannot be written: {error.strerror}; make room or fix its permissions, or choose another "
        "with run.dir=…"
    )


def _write(folder: Path, name: str, text: str) -> None:
    try:
        with atomic_write(folder / name, durable=True) as temporary:
            temporary.write_text(text)
    except OSError as error:
        raise not_writable(folder, error) from error
