"""How a run begins: what `steptron train` and `steptron resume` call on every rank.

run folder, locked ─► new: recipe.yaml, initial weights · old: a whole checkpoint, counters, detectors ─► loop.py
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from steptron.checkpoint.find import find_whole, named, newest_whole, put_aside, verify
from steptron.checkpoint.load import load, load_part
from steptron.checkpoint.manifest import read_manifest
from steptron.config.changes import changes
from steptron.config.resolve import load_recipe
from steptron.config.schema import Recipe
from steptron.data.loader import Loader
from steptron.errors import DataError, RecipeError
from steptron.parallel.collectives import together
from steptron.parallel.mesh import Meshes
from steptron.train import build
from steptron.train.lock import lock
from steptron.train.loop import run_stages
from steptron.train.rewind import rewinds_in_ledger, windows_in_ledger
from steptron.train.run import assemble
from steptron.train.signals import Signals
from steptron.train.state import Counters, counters_from_dict

log = logging.getLogger("steptron")


def train(recipe: Recipe, signals: Signals, or_resume: bool = False) -> int:
    """Start a run and go through all its stages. Returns the exit code.

    `or_resume`: go on with the run where its folder holds one; what differs from its recipe must be allowed to change."""
    device = build.pick_device(recipe)
    # A restart may come before ranks that were cut off have noticed: they end within the timeout.
    wait_s = 0.9 * recipe.run.timeout_s if or_resume else 0.0
    with build.ranks(recipe, device) as meshes, _hold(build.run_dir(recipe), wait_s) as folder:
        if build.from_first_rank((folder / "recipe.yaml").is_file):
            if not or_resume:
                raise RecipeError(
                    f"run.dir={folder} holds a run already; continue it with `steptron resume {folder}`, or give another run.name"
                )
            old = build.from_first_rank(lambda: load_recipe(folder / "recipe.yaml"))
            recipe = build.keep_groups(recipe, old)
            return _go_on(recipe, folder, changes(old, recipe), None, meshes, device, signals)
        recipe = build.pin_groups(recipe, meshes.layout)
        loader = together(lambda: build.build_loader(recipe))
        build.from_first_rank(lambda: build.refuse_place_of_another(recipe))
        build.from_first_rank(lambda: build.keep_recipe(recipe, folder))
        counters = Counters(data=loader.fingerprint)
        with assemble(recipe, folder, meshes, device, loader, counters, signals, resumed=None) as run:
            start = recipe.checkpoint.start
            if start:
                source = find_whole(Path(start), build.team())
                run.engine.load(lambda tensors: together(lambda: load_part(source, tensors)), weights_only=True)
            run.watch.record("run_start", 0, world_size=dist.get_world_size(), data=loader.fingerprint, weights=start)
            return run_stages(run, counters)


def resume(recipe: Recipe, folder: Path, changed: dict, step: int | None, signals: Signals) -> int:
    """Continue the run in `folder` from its newest whole checkpoint or that of `step`; from the start where there is none yet.

    `recipe` is the resolved recipe with the user's changes in it; `changed` (key → [old, new]) goes to the ledger."""
    device = build.pick_device(recipe)
    with build.ranks(recipe, device) as meshes, _hold(folder, 0.0):
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
    loader = together(lambda: build.build_loader(recipe))
    checkpoints = folder / "checkpoints"
    if step is not None:
        found, skipped = _named(checkpoints, step), []
    else:
        found, skipped = newest_whole(checkpoints, build.team(), build.second_place(recipe))
    counters = _counters(found, loader)
    with assemble(recipe, folder, meshes, device, loader, counters, signals, resumed=counters.step) as run:
        run = replace(run, windows=build.from_first_rank(lambda: tuple(windows_in_ledger(folder))))
        run.watch.restore(counters.watch)
        run.watch.spent_rewinds(build.from_first_rank(lambda: rewinds_in_ledger(folder)))
        for reason in skipped:
            log.warning("%s; going on from %s", reason, found.name if found else "the start")
            run.watch.record("checkpoint_skipped", counters.step, reason=reason)
        if found is not None:
            run.engine.load(lambda tensors: together(lambda: load(found, tensors)))
        if step is not None:
            build.from_first_rank(lambda: put_aside(checkpoints, step))
        if changed:
            build.from_first_rank(lambda: build.keep_recipe(recipe, folder))
        name = found.name if found else None
        run.watch.record("resume", counters.step, checkpoint=name, changes=changed, world_size=dist.get_world_size())
        return run_stages(run, counters)


@contextmanager
def _hold(folder: Path, wait_s: float) -> Iterator[Path]:
    """The run folder, made where it is not there, and locked by rank 0; who has it locked is waited for so long."""
    with ExitStack() as stack:
        build.from_first_rank(lambda: build.make_run_dir(folder))
        build.from_first_rank(lambda: stack.enter_context(lock(folder, wait_s)))
        yield folder


def _named(folder: Path, step: int) -> Path:
    team = build.team()
    path = team.from_first(lambda: named(folder, step))
    verify(path, team)
    return path


def _counters(checkpoint: Path | None, loader: Loader) -> Counters:
    """Counters of a checkpoint, or of a start. Raises `DataError` where the data order is not the checkpoint's."""
    if checkpoint is None:
        return Counters(data=loader.fingerprint)
    counters = counters_from_dict(read_manifest(checkpoint).counters)
    if counters.data != loader.fingerprint:
        raise DataError(
            f"{checkpoint.name} was trained on data {counters.data}, the recipe's sources, mixes, seed and lengths now "
            f"give {loader.fingerprint}: put the same data back, or start another run"
        )
    return counters
