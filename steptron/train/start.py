"""How a run begins: what `steptron train` and `steptron resume` call on every rank.

run folder, locked ─► new: recipe.yaml, initial weights · old: a whole checkpoint, counters, detectors ─► loop.py
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from steptron.checkpoint.coordinator import Coordinator
from steptron.checkpoint.find import find_whole, named, newest_whole, put_aside, verify
from steptron.checkpoint.load import load, load_part
from steptron.checkpoint.manifest import list_checkpoints, read_manifest
from steptron.config import identity
from steptron.config.changes import changes, recipe_hash
from steptron.config.identity import Identity
from steptron.config.paths import absolute, load_run
from steptron.config.schema import Recipe
from steptron.data.loader import Loader
from steptron.errors import CheckpointError, DataError, RecipeError, typed
from steptron.monitor.storage import ledger
from steptron.monitor.storage.files import FOLDER_NAME, Folder
from steptron.parallel.collectives import run_on_all_ranks
from steptron.parallel.mesh import Meshes
from steptron.parallel.watchdog import watch_ranks
from steptron.train import build
from steptron.train.lock import lock
from steptron.train.loop import run_stages
from steptron.train.rewind import rewinds_in_ledger, unrecorded, windows_in_ledger
from steptron.train.run import Run, assemble, saving_team
from steptron.train.signals import Signals
from steptron.train.state import Counters, counters_from_dict

log = logging.getLogger("steptron")

MOVES = {
    "moved_from": "%s was moved here from %s: the run goes on under its id",
    "copied_from": "%s is a copy of %s, where the run still is: the copy goes on as a run of its own, with its own W&B run and its own uid "
    "on metrics servers, which take it under a run.name of its own",
}
"""What is said of a folder that is not where it was."""


def train(recipe: Recipe, signals: Signals, or_resume: bool = False) -> int:
    """Start a run and go through all its stages. Returns the exit code.

    `or_resume`: go on with the run where its folder holds one; what differs from its recipe must be allowed to change."""
    device = build.pick_device(recipe)
    with build.ranks(recipe, device) as meshes, _hold(recipe, build.run_dir(recipe), or_resume) as folder:
        if build.broadcast_from_rank0(lambda: build.holds_run(folder)):
            if not or_resume:
                raise RecipeError(
                    f"run.dir={folder} holds a run already; continue it with {typed('resume', folder)}, or give another run.name"
                )
            old = build.broadcast_from_rank0(lambda: load_run(folder))
            recipe = build.keep_groups(absolute(recipe, kept=old), old)
            return _go_on(recipe, folder, changes(old, recipe), None, meshes, device, signals)
        recipe = build.pin_groups(absolute(recipe), meshes.layout)
        loader = run_on_all_ranks(lambda: build.build_loader(recipe))
        ours = build.broadcast_from_rank0(lambda: identity.at_start(None, folder))
        build.broadcast_from_rank0(lambda: build.refuse_place_of_another(recipe, folder, ours, new=True))
        build.broadcast_from_rank0(lambda: build.keep_identity(ours, folder))
        build.broadcast_from_rank0(lambda: build.keep_recipe(recipe, folder))
        counters = Counters(data=loader.fingerprint)
        saving = saving_team(recipe)
        with assemble(recipe, folder, ours, meshes, device, loader, counters, signals, saving, resumed=None) as run:
            _load_start(run)
            weights = recipe.checkpoint.init_from
            run.watch.record("run_start", 0, world_size=dist.get_world_size(), data=loader.fingerprint, weights=weights)
            return run_stages(run, counters)


def resume(recipe: Recipe, folder: Path, changed: dict, step: int | None, signals: Signals) -> int:
    """Continue the run in `folder` from its newest whole checkpoint or that of `step`; from the start where there is none yet.

    `recipe` is the resolved recipe with the user's changes in it; `changed` (key → [old, new]) goes to the ledger."""
    device = build.pick_device(recipe)
    with build.ranks(recipe, device) as meshes, _hold(recipe, folder, _is_restart()):
        if _is_restart() and build.broadcast_from_rank0(lambda: _went_back(folder, step)):
            step = None  # that was the first attempt's: the run has gone on since
        return _go_on(recipe, folder, changed, step, meshes, device, signals)


def _go_on(
    recipe: Recipe,
    folder: Path,
    changed: dict,
    step: int | None,
    meshes: Meshes,
    device: torch.device,
    signals: Signals,
) -> int:
    recipe = build.pin_groups(recipe, meshes.layout)
    loader = run_on_all_ranks(lambda: build.build_loader(recipe))
    ours, moves = build.broadcast_from_rank0(lambda: _identify(folder))
    if ours.copy_of or "checkpoint.mirror_to" in changed:  # else it is this run's, and may be away or hang
        build.broadcast_from_rank0(lambda: build.refuse_place_of_another(recipe, folder, ours, new=False))
    build.broadcast_from_rank0(lambda: _refuse_store_of_the_original(recipe, folder, moves))
    saving = saving_team(recipe)
    found, skipped = _find(recipe, folder, step, saving)
    counters = build.broadcast_from_rank0(lambda: _counters(found, recipe, loader))
    checkpoints = folder / "checkpoints"
    late = build.broadcast_from_rank0(lambda: unrecorded(folder, counters.step))
    build.broadcast_from_rank0(lambda: _settle(folder, ours, moves))
    with assemble(
        recipe, folder, ours, meshes, device, loader, counters, signals, saving, resumed=counters.step
    ) as run:
        run = replace(run, windows=build.broadcast_from_rank0(lambda: tuple(windows_in_ledger(folder))))
        run.watch.restore(counters.watch)
        run.watch.spent_rewinds(build.broadcast_from_rank0(lambda: rewinds_in_ledger(folder)))
        for reason in skipped:
            log.warning("%s; going on from %s", reason, found.name if found else "the start")
            run.watch.record("checkpoint_skipped", counters.step, reason=reason)
        for saved, evidence in late:
            run.watch.record("checkpoint", saved, **evidence)
        for move, place in moves.items():
            log.log(logging.WARNING if move == "copied_from" else logging.INFO, MOVES[move], folder, place)
        if found is not None:
            run.engine.load(lambda tensors: run_on_all_ranks(lambda: load(found, tensors)))
        else:
            _load_start(run)
        if step is not None:
            build.broadcast_from_rank0(lambda: put_aside(checkpoints, step))
        if changed:
            build.broadcast_from_rank0(lambda: build.keep_recipe(recipe, folder))
        name = found.name if found else None
        asked = {"asked": step, "job": _job()} if step is not None else {}
        world_size = dist.get_world_size()
        run.watch.record(
            "resume", counters.step, checkpoint=name, changes=changed, world_size=world_size, **asked, **moves
        )
        return run_stages(run, counters)


def _identify(folder: Path) -> tuple[Identity, dict[str, str]]:
    """Return who the run in `folder` is at this start and, by a key of `MOVES`, where its folder was before."""
    known = identity.read(folder)
    ours = identity.at_start(known, folder)
    if known is None or known.place in ("", ours.place):
        return ours, {}
    return ours, {"moved_from" if known.id == ours.id else "copied_from": known.place}


def _refuse_store_of_the_original(recipe: Recipe, folder: Path, moves: Mapping[str, str]) -> None:
    """Raise `RecipeError` where a copied run would drop rows of the original's: both name one folder outside of theirs."""
    original, shared = moves.get("copied_from"), recipe.monitor.store
    if original and shared and shared == load_run(Path(original)).monitor.store:
        raise RecipeError(
            f"monitor.store={shared} has the metrics of {original}, and {folder} is a copy of it; give the copy a folder of its own: "
            f"{typed('resume', folder, 'monitor.store=FOLDER')}"
        )


def _settle(folder: Path, ours: Identity, moves: Mapping[str, str]) -> None:
    """Write down who the run is. Data that were moved with the folder get their new paths before run.json forgets the old place."""
    if moves:
        build.keep_recipe(load_run(folder), folder)
    if "copied_from" in moves:  # a metrics server that writes into the run folder has the original's id there
        Folder.at(folder / FOLDER_NAME).disown()
    build.keep_identity(ours, folder)


def _load_start(run: Run) -> None:
    """The weights that the recipe starts from, where it names some."""
    if run.recipe.checkpoint.init_from:
        source = find_whole(Path(run.recipe.checkpoint.init_from), run.saver.team)
        run.engine.load(lambda tensors: run_on_all_ranks(lambda: load_part(source, tensors)), weights_only=True)


def _is_restart() -> bool:
    """Whether a launcher or Slurm has started these ranks before, with the same command line."""
    return any(int(os.environ.get(name, "0")) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def _job() -> str:
    """What all attempts of a job have in common."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID", "")


def _went_back(folder: Path, step: int | None) -> bool:
    """Whether this job has gone back to that step before."""
    lines = ledger.read(folder, "resume")
    return step is not None and any((line.get("asked"), line.get("job")) == (step, _job()) for line in lines)


@contextmanager
def _hold(recipe: Recipe, folder: Path, waits: bool) -> Iterator[Path]:
    """The run folder, made where it is not there, and locked by rank 0.

    `waits`: for whoever has it locked. A restart may come before ranks that were cut off have noticed: they end within the timeout."""
    wait_s = 0.9 * recipe.run.timeout_s if waits else 0.0
    with ExitStack() as stack:
        build.broadcast_from_rank0(lambda: build.make_run_dir(folder))
        build.broadcast_from_rank0(lambda: stack.enter_context(lock(folder, wait_s)))
        yield folder


def _find(recipe: Recipe, folder: Path, step: int | None, team: Coordinator) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, verified, and why newer ones were passed over; None where none was written yet.

    Raises `CheckpointError` where some were, and none can be read: beginning anew would cost the run all that it has."""
    checkpoints = folder / "checkpoints"
    with watch_ranks(recipe.checkpoint.timeout_s) as whereabouts:
        whereabouts.enter(step or 0, "reading of checkpoints")
        if step is not None:
            path = team.from_first(lambda: named(checkpoints, step))
            verify(path, team)
            return path, []
        found, skipped = newest_whole(checkpoints, team, build.second_place(recipe))
    if found is None and team.from_first(
        lambda: bool(ledger.read(folder, "checkpoint") or list_checkpoints(checkpoints))
    ):
        reasons = "; ".join(skipped) or "its folder is empty"
        raise CheckpointError(
            f"{checkpoints} has no whole checkpoint: {reasons}; bring one back, or start a new run under another run.name"
        )
    return found, skipped


def _counters(checkpoint: Path | None, recipe: Recipe, loader: Loader) -> Counters:
    """Counters of a checkpoint, or of a start. Raises `CheckpointError` where it is another recipe's, `DataError` where the data order is
    not the checkpoint's."""
    if checkpoint is None:
        return Counters(data=loader.fingerprint)
    manifest = read_manifest(checkpoint)
    if manifest.recipe_hash != recipe_hash(recipe):
        raise CheckpointError(
            f"{checkpoint.name} was made by another recipe: its model, seed, precision or optim.matrix_optimizer are not this run's; "
            "take it out of the folder, and bring back the run's own"
        )
    counters = counters_from_dict(manifest.counters)
    if counters.data != loader.fingerprint:
        raise DataError(
            f"{checkpoint.name} was trained on data {counters.data}, the recipe's sources, mixes, seed and lengths now "
            f"give {loader.fingerprint}: put the same data back, or start another run"
        )
    return counters
