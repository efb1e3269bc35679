"""The start of a run: `steptron train`, `resume` and `fork` call it on every rank, and run the stages inside.

The ranks must be in a process group (process_group.py). A run whose stages have several layouts is started once for
each, in the same process group.

run folder, locked ─┬─► new: recipe.yaml, initial weights ────────────────┬─► (Run, Counters) ─► loop.py
                    ├─► old: complete checkpoint, counters, guard's state ┘
                    └─► fork: a checkpoint of another run ─► old
"""

import gc
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from steptron.checkpoint.adopt import adopt
from steptron.checkpoint.coordinator import Coordinator
from steptron.checkpoint.find import find_complete, named, newest_complete, put_aside, verify
from steptron.checkpoint.load import load, load_part
from steptron.checkpoint.manifest import list_checkpoints, read_manifest
from steptron.checkpoint.remote import Remote
from steptron.config import identity
from steptron.config.changes import changes, recipe_hash
from steptron.config.identity import Identity, Parent
from steptron.config.paths import absolute, load_run
from steptron.config.schema import Recipe
from steptron.data.curriculum import Window, coming_stage
from steptron.data.drawn import move_limits, refuse_other_data, remix
from steptron.data.loader import Loader
from steptron.errors import CheckpointError, RecipeError, typed
from steptron.monitor.storage import ledger
from steptron.monitor.storage.files import FOLDER_NAME, Folder
from steptron.origin import origin
from steptron.parallel.collectives import broadcast_from_rank0, run_on_all_ranks
from steptron.parallel.watchdog import watch_ranks
from steptron.train.balance_groups import keep_groups, pin_groups
from steptron.train.counters import Counters, counters_from_dict
from steptron.train.device import pick_device
from steptron.train.lock import lock
from steptron.train.mirror_remote import mirror_remote, refuse_mirror_of_another_run
from steptron.train.process_group import launched_layouts, make_saving_coordinator, meshes_over
from steptron.train.rates import compare_rates
from steptron.train.rewind import rewinds_in_ledger, skips, skips_in_ledger, unrecorded, windows_in_ledger
from steptron.train.run import Run, assemble, open_data, open_loader
from steptron.train.run_folder import holds_run, make_run_dir, run_dir, write_identity, write_recipe
from steptron.train.signals import Signals

log = logging.getLogger("steptron")

MOVES = {
    "moved_from": "%s was moved here from %s: the run continues under its id",
    "copied_from": "%s is a copy of %s, where the run still is: the copy continues as a separate run, with another W&B "
    "run and another uid on metrics servers, which accept it only under another run.name",
}
"""The message about a folder that is not at its old path, by the kind of the move."""


@contextmanager
def new_run(recipe: Recipe, signals: Signals, or_resume: bool = False) -> Iterator[tuple[Run, Counters]]:
    """Build a new run, and yield it at its start. It is closed at the end.

    `or_resume`: if the folder holds the run already, continue it. Changes of its recipe must be allowed.
    """
    device, begun = pick_device(recipe.run), broadcast_from_rank0(lambda: holds_run(run_dir(recipe.run)))
    layouts = {} if begun else launched_layouts(recipe)  # an old run may be in a later stage
    with _hold(run_dir(recipe.run), recipe.run.timeout_s if or_resume else 0.0) as folder:
        if broadcast_from_rank0(lambda: holds_run(folder)):
            if not or_resume:
                raise RecipeError(
                    f"run.dir={folder} holds a run already; continue it with {typed('resume', folder)}, or give "
                    "another run.name"
                )
            old = broadcast_from_rank0(lambda: load_run(folder))
            recipe = absolute(recipe, kept=old)
            recipe = replace(recipe, stages=keep_groups(recipe.stages, old.stages))
            with _old_run(recipe, folder, changes(old, recipe), None, device, signals) as run_and_counters:
                yield run_and_counters
            return
        recipe = absolute(recipe)
        recipe = replace(recipe, stages=pin_groups(recipe.stages, layouts))
        data = run_on_all_ranks(lambda: open_data(recipe))
        counters = Counters()
        new_skips = broadcast_from_rank0(lambda: skips(recipe, folder, counters))
        ours = broadcast_from_rank0(lambda: identity.at_start(None, folder))
        broadcast_from_rank0(lambda: _refuse_mirror(recipe, folder, ours, new=True))
        broadcast_from_rank0(lambda: write_identity(ours, folder))
        broadcast_from_rank0(lambda: write_recipe(recipe, folder))
        meshes = meshes_over(layouts[coming_stage(recipe.stages, counters)], device, recipe.run.timeout_s)
        saving = make_saving_coordinator(recipe.checkpoint.timeout_s)
        with assemble(recipe, folder, ours, meshes, device, data, counters, signals, saving, resumed=None) as run:
            _load_start(run)
            facts = {"data": data.loader.fingerprint, "weights": recipe.checkpoint.init_from}
            ranks, process = dist.get_world_size(), broadcast_from_rank0(origin)
            run.recorder.record("run_start", 0, world_size=ranks, origin=process, **facts)
            _tell_of_sources(run)
            yield _leave_out(run, counters.step, new_skips), counters


@contextmanager
def resumed_run(
    recipe: Recipe, folder: Path, changed: dict, step: int | None, signals: Signals
) -> Iterator[tuple[Run, Counters]]:
    """Build the run in `folder`, and yield it at its newest complete checkpoint, or at that of `step`.

    A run without any checkpoint begins at its start. `recipe` is the resolved recipe with the user's changes in it;
    `changed` (key → [old, new]) goes to the ledger.
    """
    device = pick_device(recipe.run)
    with _hold(folder, recipe.run.timeout_s if _is_restart() else 0.0):
        if _is_restart() and broadcast_from_rank0(lambda: _went_back(folder, step)):
            step = None  # the first attempt went back, and the run has continued since
        with _old_run(recipe, folder, changed, step, device, signals) as run_and_counters:
            yield run_and_counters


def next_layout(folder: Path, signals: Signals) -> AbstractContextManager[tuple[Run, Counters]]:
    """Build the run in `folder` in the layout of its next stage, after the ranks have closed it in another one."""
    gc.collect()  # the network and optimizer of the layout before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return resumed_run(broadcast_from_rank0(lambda: load_run(folder)), folder, {}, None, signals)


@contextmanager
def forked_run(
    recipe: Recipe, parent: Path, old: Recipe, step: int | None, signals: Signals
) -> Iterator[tuple[Run, Counters]]:
    """Build a new run, and yield it at the newest complete checkpoint of the run in `parent`, or at that of `step`.

    `recipe` is that of the new run, `old` that of the parent, whose folder is only read. A restart of the same command
    continues the new run.
    """
    device = pick_device(recipe.run)
    broadcast_from_rank0(lambda: _refuse_parent(parent, step))  # before the new folder is made
    with _hold(run_dir(recipe.run), recipe.run.timeout_s if _is_restart() else 0.0) as folder:
        begun = broadcast_from_rank0(lambda: holds_run(folder))
        if begun and not _is_restart():
            raise RecipeError(
                f"run.dir={folder} holds a run already; continue it with {typed('resume', folder)}, or give the new "
                "run another NAME"
            )
        if begun:
            recipe = broadcast_from_rank0(lambda: load_run(folder))
        else:
            _begin_fork(recipe, folder, parent, old, step)
        with _old_run(recipe, folder, {}, None, device, signals, forked=not begun) as run_and_counters:
            yield run_and_counters


def _refuse_parent(parent: Path, step: int | None) -> None:
    """Raise `CheckpointError` if the run to be forked has no checkpoint, or none of `step`."""
    checkpoints = parent / "checkpoints"
    if step is not None:
        named(checkpoints, step)
    elif not list_checkpoints(checkpoints):
        raise CheckpointError(
            f"{parent} has no checkpoint yet: wait for its first one, or start a run with `steptron train`"
        )


def _begin_fork(recipe: Recipe, folder: Path, parent: Path, old: Recipe, step: int | None) -> None:
    """Write all that a resume needs into the new folder, the checkpoint last. All ranks call it."""
    loader, changed = run_on_all_ranks(lambda: open_loader(recipe)), changes(old, recipe, renamed=True)
    timeout_s = recipe.checkpoint.timeout_s
    found, skipped = _find(parent, step, make_saving_coordinator(timeout_s), timeout_s)
    assert found is not None, "_refuse_parent has seen a checkpoint, and _find raises if none is complete"
    counters = broadcast_from_rank0(lambda: _counters(found, recipe, loader, forks=True))
    layouts = launched_layouts(recipe, coming_stage(recipe.stages, counters))
    recipe = replace(recipe, stages=pin_groups(recipe.stages, layouts))

    def write() -> list[str]:
        theirs = identity.read(parent)
        lines = compare_rates(old.stages, recipe.stages, counters)
        link = Parent(
            id=theirs.id if theirs else "", name=old.run.name, place=os.path.realpath(parent), step=counters.step
        )
        ours = replace(identity.at_start(None, folder), parent=link)
        _refuse_mirror(recipe, folder, ours, new=True)
        if recipe.monitor.store and recipe.monitor.store == old.monitor.store:
            raise RecipeError(
                f"monitor.store={recipe.monitor.store} has the metrics of {parent}; give the new run another folder "
                "with monitor.store=FOLDER, or its own with monitor.store=''"
            )
        write_identity(ours, folder)
        write_recipe(recipe, folder)
        facts = {"parent": asdict(link), "checkpoint": found.name, "changes": changed, "guard": counters.guard}
        windows = [list(window) for window in windows_in_ledger(parent)]
        facts |= {"windows": windows, "skips": skips_in_ledger(parent)}
        facts |= {"world_size": dist.get_world_size(), "origin": origin()}
        ledger.Ledger(folder).write("fork", counters.step, **facts)
        adopt(found, folder / "checkpoints", counters.to_dict())  # the last step: from here on the folder holds a run
        warnings = [f"warning: {reason}; starting from {found.name}" for reason in skipped]
        return [*warnings, f"forked from {old.run.name} at step {counters.step}: {folder}", *lines]

    _say(broadcast_from_rank0(write))


def _say(lines: Iterable[str]) -> None:
    """Print lines for the person who has started the run, on rank 0."""
    for line in lines if dist.get_rank() == 0 else ():
        print(line, flush=True)


@contextmanager
def _old_run(
    recipe: Recipe,
    folder: Path,
    changed: dict,
    step: int | None,
    device: torch.device,
    signals: Signals,
    forked: bool = False,
) -> Iterator[tuple[Run, Counters]]:
    data = run_on_all_ranks(lambda: open_data(recipe))
    ours, moves = broadcast_from_rank0(lambda: _identify(folder))
    if ours.copy_of or "checkpoint.mirror_to" in changed:  # otherwise it is this run's, and may be away or hang
        broadcast_from_rank0(lambda: _refuse_mirror(recipe, folder, ours, new=False))
    broadcast_from_rank0(lambda: _refuse_store_of_the_original(recipe.monitor.store, folder, moves))
    saving = make_saving_coordinator(recipe.checkpoint.timeout_s)
    remote = mirror_remote(recipe.checkpoint.mirror_to, recipe.run.name)
    found, skipped = _find(folder, step, saving, recipe.checkpoint.timeout_s, remote)
    counters = broadcast_from_rank0(lambda: _counters(found, recipe, data.loader))
    data = data._replace(loader=data.loader.continued(counters.drawn))
    coming = coming_stage(recipe.stages, counters)
    layouts = launched_layouts(recipe, coming)
    recipe = replace(recipe, stages=pin_groups(recipe.stages, layouts))
    if any(key.startswith("stages.") for key in changed):
        _say(broadcast_from_rank0(lambda: compare_rates(load_run(folder).stages, recipe.stages, counters)))
    new_skips = broadcast_from_rank0(lambda: skips(recipe, folder, counters))
    late = broadcast_from_rank0(lambda: unrecorded(folder, counters.step))
    broadcast_from_rank0(lambda: _settle(folder, ours, moves))
    meshes = meshes_over(layouts[coming], device, recipe.run.timeout_s)
    with assemble(recipe, folder, ours, meshes, device, data, counters, signals, saving, resumed=counters.step) as run:
        run.guard.restore(counters.guard)
        run.guard.spent_rewinds(broadcast_from_rank0(lambda: rewinds_in_ledger(folder)))
        for reason in skipped:
            log.warning("%s; continuing from %s", reason, found.name if found else "the start")
            run.recorder.record("checkpoint_skipped", counters.step, reason=reason)
        for saved, evidence in late:
            run.recorder.record("checkpoint", saved, **evidence)
        for move, place in moves.items():
            log.log(logging.WARNING if move == "copied_from" else logging.INFO, MOVES[move], folder, place)
        if found is not None:
            run.engine.load(lambda tensors: run_on_all_ranks(lambda: load(found, tensors)))
        else:
            _load_start(run)
        if step is not None:
            broadcast_from_rank0(lambda: put_aside(folder / "checkpoints", step))
        if changed:
            broadcast_from_rank0(lambda: write_recipe(recipe, folder))
        asked = {"asked": step, "job": _job()} if step is not None else {}
        if not forked:  # then the ledger has a line of its own
            name, facts = found.name if found else None, {"world_size": dist.get_world_size()}
            facts |= {"origin": broadcast_from_rank0(origin)}
            run.recorder.record("resume", counters.step, checkpoint=name, changes=changed, **facts, **asked, **moves)
        _tell_of_sources(run)
        yield _leave_out(run, counters.step, new_skips), counters


def _tell_of_sources(run: Run) -> None:
    """Record how each stage will read its sources; say it of those that are read more than once or padded."""
    planned = {name: run.loader.planned(name) for name in run.recipe.stages}
    for stage, sources in planned.items():
        for name, reading in sources.items():
            if reading.epochs > 1:
                log.warning(
                    "stage %s reads source %s %.2f times: it is shorter than its share", stage, name, reading.epochs
                )
            if reading.waste:
                log.warning("stage %s packs source %s with %.1f %% padding", stage, name, 100 * reading.waste)
    run.recorder.record(
        "sources",
        run.recorder.last_step,
        stages={
            stage: {name: reading._asdict() for name, reading in sources.items()} for stage, sources in planned.items()
        },
    )


def _leave_out(run: Run, step: int, new: Sequence[tuple[list[int], list[Window]]]) -> Run:
    """Return the run without the samples that rewinds and `data.skip` leave out. `new`: what the ledger lacks of it."""
    known = broadcast_from_rank0(lambda: windows_in_ledger(run.folder))
    for steps, windows in new:
        run.recorder.record("skip", step, steps=steps, windows=[list(window) for window in windows])
    return replace(run, windows=(*known, *(window for _, windows in new for window in windows)))


def _identify(folder: Path) -> tuple[Identity, dict[str, str]]:
    """Return the identity of the run in `folder` at this start and, by a key of `MOVES`, the old path of its folder."""
    known = identity.read(folder)
    ours = identity.at_start(known, folder)
    if known is None or known.place in ("", ours.place):
        return ours, {}
    return ours, {"moved_from" if known.id == ours.id else "copied_from": known.place}


def _refuse_mirror(recipe: Recipe, folder: Path, ours: Identity, new: bool) -> None:
    refuse_mirror_of_another_run(recipe.checkpoint.mirror_to, recipe.run.name, folder, ours, new)


def _refuse_store_of_the_original(shared: str, folder: Path, moves: Mapping[str, str]) -> None:
    """Raise `RecipeError` if a copied run would drop rows of the original's, because both use the store `shared`."""
    original = moves.get("copied_from")
    if original and shared and shared == load_run(Path(original)).monitor.store:
        raise RecipeError(
            f"monitor.store={shared} has the metrics of {original}, and {folder} is a copy of it; "
            f"give the copy another folder: {typed('resume', folder, 'monitor.store=FOLDER')}"
        )


def _settle(folder: Path, ours: Identity, moves: Mapping[str, str]) -> None:
    """Write the identity of the run. Before, data that moved with the folder get new paths: run.json forgets the old
    one."""
    if moves:
        write_recipe(load_run(folder), folder)
    if "copied_from" in moves:  # a metrics server that writes into the run folder has the original's id there
        Folder.at(folder / FOLDER_NAME).disown()
    write_identity(ours, folder)


def _load_start(run: Run) -> None:
    """Load the weights that the recipe starts from, if it names some."""
    if run.recipe.checkpoint.init_from:
        source = find_complete(Path(run.recipe.checkpoint.init_from), run.saver.coordinator)
        run.engine.load(lambda tensors: run_on_all_ranks(lambda: load_part(source, tensors)), weights_only=True)


def _is_restart() -> bool:
    """Return whether a launcher or Slurm has started these ranks before, with the same command line."""
    return any(int(os.environ.get(name, "0")) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def _job() -> str:
    """Return the id that all attempts of a job share."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID", "")


def _went_back(folder: Path, step: int | None) -> bool:
    """Return whether this job has already gone back to that step."""
    lines = ledger.read(folder, "resume")
    return step is not None and any((line.get("asked"), line.get("job")) == (step, _job()) for line in lines)


@contextmanager
def _hold(folder: Path, timeout_s: float) -> Iterator[Path]:
    """Create the run folder if it does not exist, lock it on rank 0, and yield it.

    A restart may come before the ranks of the attempt before have noticed that they were cut off. They end within
    `timeout_s`, and the lock waits for most of it. With 0 it does not wait.
    """
    with ExitStack() as stack:
        broadcast_from_rank0(lambda: make_run_dir(folder))
        broadcast_from_rank0(lambda: stack.enter_context(lock(folder, 0.9 * timeout_s)))
        yield folder


def _find(
    folder: Path, step: int | None, saving: Coordinator, timeout_s: float, remote: Remote | None = None
) -> tuple[Path | None, list[str]]:
    """Return the verified checkpoint to continue from, and why newer ones were skipped. None if none was written yet.

    `remote`: the mirror, from which a damaged checkpoint is restored. Raises `CheckpointError` if some were written and
    none can be read: a new start would lose all that the run has.
    """
    checkpoints = folder / "checkpoints"
    with watch_ranks(timeout_s) as status:
        status.enter(step or 0, "reading of checkpoints")
        if step is not None:
            path = saving.from_first(lambda: named(checkpoints, step))
            verify(path, saving)
            return path, []
        found, skipped = newest_complete(checkpoints, saving, remote)
    if found is None and saving.from_first(
        lambda: bool(ledger.read(folder, "checkpoint") or list_checkpoints(checkpoints))
    ):
        reasons = "; ".join(skipped) or "its folder is empty"
        raise CheckpointError(
            f"{checkpoints} has no complete checkpoint: {reasons}; restore one, or start a new run under another "
            "run.name"
        )
    return found, skipped


def _counters(checkpoint: Path | None, recipe: Recipe, loader: Loader, forks: bool = False) -> Counters:
    """Return the counters of a checkpoint, or of a start.

    `forks`: the present stage may have another mix from here on, if it is not done. Raises `CheckpointError` if the
    checkpoint belongs to another recipe, whose `recipe_hash` differs, and `DataError` if the recipe's stages that have
    begun would draw other samples.
    """
    if checkpoint is None:
        return Counters()
    manifest = read_manifest(checkpoint)
    if manifest.recipe_hash != recipe_hash(recipe):
        raise CheckpointError(
            f"{checkpoint.name} was made by another recipe: its model, seed, precision or optim.matrix_optimizer "
            "are not this run's; remove it from the folder, and restore the run's own"
        )
    counters = counters_from_dict(manifest.counters)
    stage, begun = recipe.stages.get(counters.stage), list(counters.drawn.get("stages", ()))
    if begun and recipe.stages.keys() >= set(begun):
        drawn = move_limits(counters.drawn, counters.samples_by_stage, loader.facts(begun))
        counters = replace(counters, drawn=dict(drawn))
    if forks and stage and counters.stage_tokens < stage.tokens and recipe.stages.keys() >= set(begun):
        drawn = remix(counters.drawn, counters.stage, counters.stage_samples, loader.facts(begun))
        counters = replace(counters, drawn=dict(drawn))
    refuse_other_data(counters.drawn, list(recipe.stages), loader.continued(counters.drawn).facts)
    return counters
