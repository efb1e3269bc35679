"""The run as a list of stages: what `steptron train` and `steptron resume` call on every rank.

counters → stage → settings of the step → step.py → decision ─┬─ counters, metrics, checkpoint
                                                               └─ rewind: counters of a checkpoint, past the data that did it
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from steptron.checkpoint.load import find_whole, load, load_part, newest_whole
from steptron.checkpoint.manifest import read_manifest
from steptron.checkpoint.save import save
from steptron.config.decode import encode
from steptron.config.resolve import recipe_hash
from steptron.config.schema import Recipe, StageConfig
from steptron.data.loader import Batch, Loader, Prefetcher
from steptron.errors import DataError, PolicyStop, RankLostError, SteptronError
from steptron.model.flops import flops_per_token
from steptron.model.inputs import Inputs, count_targets
from steptron.monitor.frame import Scalar
from steptron.monitor.policy import Decision
from steptron.optim.schedule import bias_rate, learning_rate
from steptron.parallel.clock import Clock, communication_clock
from steptron.parallel.collectives import limit_all_groups, together
from steptron.parallel.cp import sequence_pieces
from steptron.parallel.mesh import Meshes, data_rank
from steptron.parallel.network import Network
from steptron.parallel.watchdog import Whereabouts, watch_ranks
from steptron.train import build
from steptron.train.engines import Engine, build_engine
from steptron.train.peak import peak_flops
from steptron.train.rewind import bad_windows, checkpoint_before, rewinds_in_ledger, windows_in_ledger
from steptron.train.seen import watch_network
from steptron.train.state import Counters, StepPlan, Window, coming_steps, counters_from_dict
from steptron.train.step import StepBatch, StepResult, StepSettings, train_step
from steptron.train.watch import Watch

log = logging.getLogger("steptron")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The components of a run on one rank."""

    recipe: Recipe
    folder: Path
    meshes: Meshes
    engine: Engine
    loader: Loader
    watch: Watch
    peak: float | None
    whereabouts: Whereabouts
    clock: Clock
    windows: tuple[Window, ...] = ()
    """Samples that rewinds have found harmful."""

    @property
    def network(self) -> Network:
        """The engine's."""
        return self.engine.network


class _Rewind(Exception):
    """Ends a stage's steps: the run is to go back. Carries the counters before the step, and the decision on it."""

    def __init__(self, counters: Counters, decision: Decision):
        self.counters, self.decision = counters, decision


def train(recipe: Recipe) -> int:
    """Start a run and go through all its stages. Returns the exit code."""
    device = build.pick_device(recipe)
    with build.ranks(recipe, device) as meshes:
        recipe = build.pin_groups(recipe, meshes.layout)
        loader = together(lambda: build.build_loader(recipe))
        folder = together(lambda: build.claim_run_dir(recipe))
        counters = Counters(data=loader.fingerprint)
        with assemble(recipe, folder, meshes, device, loader, counters, resumed=None) as run:
            start = recipe.checkpoint.start
            if start:
                source = together(lambda: find_whole(Path(start)))
                run.engine.load(lambda tensors: together(lambda: load_part(source, tensors)), weights_only=True)
            run.watch.record("run_start", 0, world_size=dist.get_world_size(), data=loader.fingerprint, weights=start)
            return _run_stages(run, counters)


def resume(recipe: Recipe, folder: Path, changes: dict) -> int:
    """Continue the run in `folder` from its newest whole checkpoint, or from the start where there is none yet.

    `recipe` is the resolved recipe with the user's changes in it; `changes` (key → [old, new]) goes to the ledger."""
    device = build.pick_device(recipe)
    with build.ranks(recipe, device) as meshes:
        recipe = build.pin_groups(recipe, meshes.layout)
        loader = together(lambda: build.build_loader(recipe))
        found, skipped = build.from_first_rank(lambda: newest_whole(folder / "checkpoints"))
        counters = _counters(found, loader)
        with assemble(recipe, folder, meshes, device, loader, counters, resumed=counters.step) as run:
            run = replace(run, windows=build.from_first_rank(lambda: tuple(windows_in_ledger(folder))))
            run.watch.restore(counters.watch)
            run.watch.spent_rewinds(build.from_first_rank(lambda: rewinds_in_ledger(folder)))
            for reason in skipped:
                run.watch.record("checkpoint_skipped", counters.step, reason=reason)
            if found is not None:
                run.engine.load(lambda tensors: together(lambda: load(found, tensors)))
            if changes and dist.get_rank() == 0:
                build.write_recipe(recipe, folder)
            name = found.name if found else None
            run.watch.record(
                "resume", counters.step, checkpoint=name, changes=changes, world_size=dist.get_world_size()
            )
            return _run_stages(run, counters)


@contextmanager
def assemble(
    recipe: Recipe,
    folder: Path,
    meshes: Meshes,
    device: torch.device,
    loader: Loader,
    counters: Counters,
    resumed: int | None,
) -> Iterator[Run]:
    handler = build.log_to_file(folder)
    engine = build_engine(recipe, meshes, device)
    seen = watch_network(recipe, meshes, engine.network, loader.sources)
    engine.observe(seen.updates)
    watch = Watch(recipe, folder, meshes, seen, tokens=counters.tokens, resumed=resumed)
    peak = recipe.monitor.peak_tflops * 1e12 if recipe.monitor.peak_tflops else peak_flops(device, recipe.precision)
    try:
        with watch_ranks(recipe.run.timeout_s) as whereabouts, communication_clock() as clock:
            whereabouts.enter(counters.step, "start")
            limit_all_groups(recipe.run.timeout_s)
            yield Run(
                recipe=recipe,
                folder=folder,
                meshes=meshes,
                engine=engine,
                loader=loader,
                watch=watch,
                peak=peak,
                whereabouts=whereabouts,
                clock=clock,
            )
    except SteptronError as error:
        watch.record("run_end", watch.last_step, reason=str(error))
        if isinstance(error, RankLostError):
            watch.be_brief()
        raise
    finally:
        watch.close()
        log.removeHandler(handler)
        handler.close()


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


def _run_stages(run: Run, counters: Counters) -> int:
    run.watch.begin_run()
    while (coming := next(_coming(run, counters), None)) is not None:
        _, counters = coming
        try:
            counters = _run_stage(run, counters)
        except _Rewind as rewind:
            run, counters = _rewind(run, rewind.counters, rewind.decision)
    run.watch.record("run_end", counters.step, tokens=counters.tokens, tokens_by_source=counters.tokens_by_source)
    return 0


def _run_stage(run: Run, counters: Counters) -> Counters:
    """Steps until the budget of the counters' stage is reached; a checkpoint at its end."""
    name, saved = counters.stage, counters.step
    stage = run.recipe.stages[name]
    run.network.apply_stage(stage, num_groups=run.meshes.layout.expert["ep"])
    run.watch.apply_limits(run.network)
    run.watch.record("stage_start", counters.step, stage=name, tokens=counters.tokens, settings=encode(stage))
    with Prefetcher(run.loader, _micro_batches(run, counters)) as prefetcher:
        ready = iter(prefetcher)
        for plan in _stage_plans(run, counters):
            counters = run_step(run, counters, plan.samples, ready)
            if counters.step % run.recipe.checkpoint.every == 0:
                _save(run, counters)
                saved = counters.step
    if saved != counters.step:
        _save(run, counters)
    return counters


def run_step(run: Run, counters: Counters, samples: range, ready: Iterator[Batch]) -> Counters:
    """One step on these samples, and the counters after it. Raises `_Rewind` or `PolicyStop` where it is not to count."""
    name = counters.stage
    stage = run.recipe.stages[name]
    run.clock.take()  # what was waited for since the last step is not this one's
    start = time.perf_counter()
    run.whereabouts.enter(counters.step + 1, "data")
    settings = step_settings(run.recipe, stage, counters.stage_tokens, len(samples))
    batches = [next(ready) for _ in range(len(samples) // (stage.micro_batch * run.meshes.layout.data_ranks))]
    data_wait = time.perf_counter() - start
    run.whereabouts.enter(counters.step + 1, "training step")
    run.watch.begin(name)
    batch = step_batch(batches, stage.seq_len, run.meshes, run.network.device, run.loader.sources)
    result = train_step(run.engine, batch, settings, run.watch)
    decision = run.watch.decision
    if decision.act == "rewind":
        raise _Rewind(counters, decision)
    if decision.act == "stop":
        _stop(run, counters, decision)
    run.watch.apply_limits(run.network)
    by_source = run.loader.tokens_by_source(name, samples)
    counters = counters.after_step(samples, stage.seq_len, by_source)
    seconds = time.perf_counter() - start
    metrics = _metrics(run, counters, settings, result, seconds)
    run.watch.step(metrics, by_source, data_wait, run.clock.take())
    return counters


def _coming(run: Run, counters: Counters) -> Iterator[tuple[StepPlan, Counters]]:
    return coming_steps(run.recipe.stages, counters, run.windows)


def _stage_plans(run: Run, counters: Counters) -> Iterator[StepPlan]:
    """The steps from here to the end of the counters' stage."""
    return (plan for plan, _ in takewhile(lambda coming: coming[0].stage == counters.stage, _coming(run, counters)))


def _micro_batches(run: Run, counters: Counters) -> Iterator[tuple[str, range]]:
    """Sample indices of this rank's micro-batches in these steps."""
    ranks, rank = run.meshes.layout.data_ranks, data_rank(run.meshes)
    for plan in _stage_plans(run, counters):
        micro_batch = run.recipe.stages[plan.stage].micro_batch
        for indices in row_ranges(plan.samples.start, len(plan.samples), micro_batch, rank, ranks):
            yield plan.stage, indices


def _rewind(run: Run, counters: Counters, decision: Decision) -> tuple[Run, Counters]:
    """Back to the newest whole checkpoint before the first bad step; what was read in the bad steps is left out from now on."""
    checkpoints, policy = run.folder / "checkpoints", run.recipe.monitor.policy
    path = build.from_first_rank(lambda: checkpoint_before(checkpoints, decision.since))
    if path is None:
        _stop(
            run,
            counters,
            replace(decision, reason=f"there is no checkpoint before step {decision.since}; {decision.reason}"),
        )
    start = build.from_first_rank(lambda: counters_from_dict(read_manifest(path).counters))
    stages, step = run.recipe.stages, counters.step + 1
    new = bad_windows(stages, start, run.windows, decision.since, policy.rewind_before, step)
    run.engine.load(lambda tensors: together(lambda: load(path, tensors)))
    run.watch.record(
        "rewind",
        step,
        to=start.step,
        checkpoint=path.name,
        windows=[list(window) for window in new],
        reason=decision.reason,
    )
    run.watch.go_back(start.step, start.watch)
    return replace(run, windows=(*run.windows, *new)), start


def _stop(run: Run, counters: Counters, decision: Decision) -> NoReturn:
    """End the run before the update of this step; saved, unless weights may be no use."""
    run.watch.undo()
    doubtful = any(alarm.detector == "not_finite" for alarm in decision.alarms)
    path = run.folder / "checkpoints" / f"step-{counters.step:08d}"
    if not doubtful and not build.from_first_rank(path.exists):
        _save(run, counters)
    kept = "nothing was saved" if doubtful else f"saved at step {counters.step}"
    raise PolicyStop(
        f"step {counters.step + 1}: {decision.reason}; the policy ends the run, {kept}; look at the report, then go on with "
        "`steptron resume`, with another monitor.policy or another learning rate"
    )


def row_ranges(first: int, rows: int, micro_batch: int, rank: int, ranks: int) -> list[range]:
    """Sample indices of each micro-batch of one of `ranks` data-parallel ranks, of the global batch of `rows` that starts at `first`."""
    starts = range(first + rank * micro_batch, first + rows, ranks * micro_batch)
    return [range(start, start + micro_batch) for start in starts]


def step_batch(
    batches: list[Batch], seq_len: int, meshes: Meshes, device: torch.device, sources: Sequence[str] = ()
) -> StepBatch:
    """What this rank's model reads of its rows, and the targets of the global batch.

    `sources`: names by number, for statistics; none where there are none.
    The rows are the same on all ranks of a cp, tp and pp group: a sum over all ranks counts them that often."""
    cp = meshes.dense["cp"]
    pieces = sequence_pieces(seq_len, cp.size(), cp.get_local_rank())
    targets_H = torch.stack([count_targets(batch.documents_BS, seq_len) for batch in batches]).sum(0).to(device)
    dist.all_reduce(targets_H)
    return StepBatch(
        inputs=[
            Inputs.from_rows(
                batch.tokens_BS,
                batch.documents_BS,
                seq_len,
                pieces,
                [sources.index(name) for name in batch.sources] if sources else None,
            )
            for batch in batches
        ],
        targets_H=targets_H // (meshes.layout.world_size // meshes.layout.data_ranks),
    )


def step_settings(recipe: Recipe, stage: StageConfig, stage_tokens: int, rows: int) -> StepSettings:
    """Settings of the step of `rows` sequences after `stage_tokens` tokens of the stage.

    Schedules are read at the step's last token, so that the first step has a learning rate and the last one ends the segment."""
    tokens = min(stage_tokens + rows * stage.seq_len, stage.tokens)
    return StepSettings(
        seq_len=stage.seq_len,
        batch_size=rows,
        lr=learning_rate(stage.lr, tokens, stage.tokens),
        bias_rate=0.0 if stage.balance.freeze_router else bias_rate(stage.balance, tokens, stage.tokens),
        mtp_weight=stage.mtp_weight,
        clip_norm=recipe.optim.clip_norm,
    )


def _metrics(
    run: Run, counters: Counters, settings: StepSettings, result: StepResult, seconds: float
) -> dict[str, Scalar]:
    """The step's line in metrics.jsonl."""
    batch_tokens = settings.batch_size * settings.seq_len
    rate = batch_tokens / seconds
    flops = flops_per_token(run.recipe.model, settings.seq_len)
    return {
        "step": counters.step,
        "stage": counters.stage,
        "tokens": counters.tokens,
        "loss": result.loss,
        "lm_loss": result.lm_loss,
        "mtp_loss": result.mtp_loss,
        "balance_loss": result.balance_loss,
        "grad_norm": result.grad_norm,
        "lr": settings.lr,
        "seq_len": settings.seq_len,
        "batch_tokens": batch_tokens,
        "step_time": seconds,
        "tokens_per_second": rate,
        "mfu": rate * flops / (run.peak * dist.get_world_size()) if run.peak else None,
        "act": run.watch.decision.act,
    }


def _save(run: Run, counters: Counters) -> None:
    run.whereabouts.enter(counters.step, "checkpoint")
    run.watch.flush()
    layout = {
        "world_size": run.meshes.layout.world_size,
        "dense": run.meshes.layout.dense,
        "expert": run.meshes.layout.expert,
    }
    start = time.perf_counter()
    path = save(
        run.folder / "checkpoints",
        step=counters.step,
        tensors=run.engine.state(),
        counters=replace(counters, watch=run.watch.state()).to_dict(),
        recipe_hash=recipe_hash(run.recipe),
        layout=layout,
        keep=run.recipe.checkpoint.keep,
        together=together,
    )
    run.watch.record("checkpoint", counters.step, path=path.name, seconds=round(time.perf_counter() - start, 3))
