"""The content of a run folder or a checkpoint, as values and as tables: `steptron inspect`."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from steptron.checkpoint.manifest import Manifest, check_files, list_checkpoints, read_manifest, step_of
from steptron.checkpoint.metadata import read_metadata
from steptron.config import identity
from steptron.config.paths import load_run
from steptron.config.schema import StageConfig
from steptron.errors import CheckpointError, typed
from steptron.model.flops import num_parameters
from steptron.monitor.storage import ledger
from steptron.train.counters import totals_by_source
from steptron.train.lock import owner


def summarise(path: Path) -> dict[str, Any]:
    """Return the run's stages, tokens, parameters and checkpoints, as JSON-able values.

    Raises `CheckpointError` or `RecipeError` if the folder is not a run.
    """
    is_checkpoint = path.parent.name == "checkpoints" and path.is_dir()
    folder = path.parent.parent if is_checkpoint else path
    if not (folder / "recipe.yaml").is_file():
        raise CheckpointError(
            f"{path} is neither a run folder (with recipe.yaml) nor one of its checkpoints/step-… folders"
        )
    recipe, known = load_run(folder), identity.read(folder)
    checkpoints = [
        _checkpoint(found) for found in ([path] if is_checkpoint else list_checkpoints(folder / "checkpoints"))
    ]
    newest = next((c for c in checkpoints if c["problem"] is None), None)
    counters = newest["counters"] if newest else {}
    sources = counters.get("sources", {})
    stages = [
        {
            "name": name,
            "seq_len": stage.seq_len,
            "tokens": stage.tokens,
            "done": sum(spent["tokens"] for spent in sources.get(name, {}).values()),
        }
        for name, stage in recipe.stages.items()
    ]
    return {
        "run": recipe.run.name,
        "folder": str(folder),
        "parent": asdict(known.parent) if known and known.parent else None,
        "parameters": num_parameters(recipe.model),
        "stages": stages,
        "step": counters.get("step", 0),
        "tokens": counters.get("tokens", 0),
        "tokens_by_source": totals_by_source(sources),
        "sources": sources,
        "checkpoints": checkpoints,
        "resume": _resume(
            folder, recipe.checkpoint.mirror_to, recipe.stages, checkpoints, newest, path if is_checkpoint else None
        ),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Print the summary as tables."""
    console = Console()
    console.print(
        f"[bold]{summary['run']}[/]  {summary['folder']}  {summary['parameters']:,} parameters  "
        f"step {summary['step']:,}  {summary['tokens']:,} tokens"
    )
    if parent := summary["parent"]:
        console.print(
            f"forked from {parent['name']} at step {parent['step']:,}: {parent['place']}", markup=False, soft_wrap=True
        )
    stages = Table("stage", "length", "tokens", "budget", "done", title="stages, at the newest complete checkpoint")
    for stage in summary["stages"]:
        share = stage["done"] / stage["tokens"]
        stages.add_row(
            stage["name"], f"{stage['seq_len']:,}", f"{stage['done']:,}", f"{stage['tokens']:,}", f"{share:.0%}"
        )
    console.print(stages)
    if summary["sources"]:
        console.print(_sources(summary))
    checkpoints = Table("checkpoint", "stage", "size", "ranks", "complete", title="checkpoints")
    for checkpoint in summary["checkpoints"]:
        checkpoints.add_row(
            checkpoint["name"],
            checkpoint["counters"].get("stage", ""),
            f"{checkpoint['bytes'] / 1e6:,.1f} MB",
            str(checkpoint["layout"].get("world_size", "")),
            "yes" if checkpoint["problem"] is None else f"[red]{checkpoint['problem']}[/]",
        )
    console.print(checkpoints)
    resume = summary["resume"]
    console.print(f"`{resume['command']}` {resume['does']}", markup=False, soft_wrap=True)
    for reason in resume["skips"]:
        console.print(f"  [red]not {reason}[/]")
    if resume["owner"]:
        console.print(f"  [yellow]but not now: {summary['folder']} is being trained by {resume['owner']}[/]")


def _sources(summary: dict[str, Any]) -> Table:
    """Return the tokens by stage and source, with their sum."""
    table = Table("stage", "source", "tokens", "share", "unmasked", "epochs", title="tokens by stage and source")
    rows = [(stage, name, spent) for stage, sources in summary["sources"].items() for name, spent in sources.items()]
    for stage, name, spent in rows:
        share = spent["tokens"] / max(summary["tokens"], 1)
        epochs = f"{spent['tokens'] / spent['epoch']:.2f}"
        table.add_row(stage, name, f"{spent['tokens']:,}", f"{share:.1%}", f"{spent['unmasked']:,}", epochs)
    total, unmasked = (sum(spent[key] for _, _, spent in rows) for key in ("tokens", "unmasked"))
    table.add_section()
    table.add_row("all", "", f"{total:,}", "100.0%", f"{unmasked:,}", "")
    return table


def _resume(
    folder: Path,
    mirror_to: str,
    stages: Mapping[str, StageConfig],
    checkpoints: list[dict[str, Any]],
    newest: dict[str, Any] | None,
    chosen: Path | None,
) -> dict[str, Any]:
    """Return what `steptron resume` would do. `chosen`: the checkpoint that the user named."""
    step = ("--step", step_of(chosen)) if chosen else ()
    skips = [c["problem"] for c in checkpoints[: checkpoints.index(newest) if newest else None]]
    saved = ledger.read(folder, "checkpoint")
    nothing = "is refused: no checkpoint is complete" if saved else "begins at the first step"
    does = f"continues from {newest['name']}" if newest else nothing
    if mirror_to and (skips or not newest):
        does = f"looks for a copy in {mirror_to}, or {does}"
    if newest and newest["counters"]["stage"] == list(stages)[-1]:
        stage = stages[newest["counters"]["stage"]]
        if newest["counters"]["stage_tokens"] >= stage.tokens:
            does += ", and has nothing left to do: its last stage is done"
    return {"command": typed("resume", folder, *step).strip("`"), "does": does, "skips": skips, "owner": owner(folder)}


def _checkpoint(path: Path) -> dict[str, Any]:
    manifest: Manifest | None = None
    problem = None
    try:
        manifest = read_manifest(path)
        check_files(path, manifest)
        read_metadata(path, manifest)
    except CheckpointError as error:
        problem = str(error)
    return {
        "name": path.name,
        "problem": problem,
        "bytes": sum(entry.bytes for entry in manifest.files.values()) if manifest else 0,
        "layout": manifest.layout if manifest else {},
        "counters": manifest.counters if manifest else {},
    }
