"""The run as a list of stages, from counters to the end, on every rank.

counters → stage → settings of the step → step.py → decision ─┬─ counters, metrics, checkpoint
                                                               └─ rewind: counters of a checkpoint, past the data that did it
A signal, or a checkpoint that could not be written, ends it after the same step on all ranks: each step's first all-reduce tells of them.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from typing import NoReturn

import torch
import torch.distributed as dist

from steptron.checkpoint.find import newest_whole, put_aside, way_back
from steptron.checkpoint.load import load
from steptron.checkpoint.manifest import read_manifest, step_name
from steptron.config.changes import recipe_hash
from steptron.config.decode import encode
from steptron.data.loader import Batch, Prefetcher
from steptron.errors import MaskedError, PolicyStop, RouterError, SaveError, SignalStop, typed
from steptron.model.flops import flops_per_token
from steptron.monitor.detect.policy import Decision
from steptron.monitor.statistics.frame import Scalar
from steptron.parallel.collectives import run_on_all_ranks
from steptron.parallel.mesh import data_rank
from steptron.train import build
from steptron.train.batch import row_ranges, step_batch, step_settings
from steptron.train.rewind import bad_windows
from steptron.train.run import Run
from steptron.train.signals import NAMES
from steptron.train.state import Counters, StepPlan, coming_steps, counters_from_dict
from steptron.train.step import StepResult, StepSettings, train_step


class _Rewind(Exception):
    """Ends a stage's steps: the run is to go back. Carries the counters before the step, and the decision on it."""

    def __init__(self, counters: Counters, decision: Decision):
        self.counters, self.decision = counters, decision


def run_stages(run: Run, counters: Counters) -> int:
    """To the end of the last stage. Returns the exit code; raises `SignalStop`, `PolicyStop`, `SaveError` on all ranks."""
    run.watch.begin_run()
    while (coming := next(_coming(run, counters), None)) is not None:
        _, counters = coming
        try:
            counters = _run_stage(run, counters)
        except _Rewind as rewind:
            run, counters = _rewind(run, rewind.counters, rewind.decision)
    _finish_saving(run)
    run.saver.close(run.recipe.run.timeout_s)  # with its copies
    _record_saved(run)
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
    notices = [*run.signals.came, int(run.saver.failed)]
    batch = step_batch(batches, stage.seq_len, run.meshes, run.network.device, run.loader.sources, notices)
    result = train_step(run.engine, batch, settings, run.watch, run.loss)
    if not result.target_weight:
        _refuse_masked(run, counters, samples)
    decision = run.watch.decision
    if decision.act == "rewind":
        raise _Rewind(counters, decision)
    if result.broken is not None:
        _refuse(run, counters, *result.broken)
    if decision.act == "stop":
        _stop(run, counters, decision)
    run.watch.apply_limits(run.network)
    by_source = run.loader.tokens_by_source(name, samples)
    counters = counters.after_step(samples, stage.seq_len, by_source)
    seconds = time.perf_counter() - start
    metrics = _metrics(run, counters, settings, result, seconds)
    run.watch.step(metrics, by_source, data_wait, run.clock.take())
    _record_saved(run)
    _heed(run, counters, batch.notices)
    return counters


def _heed(run: Run, counters: Counters, notices: torch.Tensor) -> None:
    """End the run where a rank was told to stop, or could not write a checkpoint."""
    *came, failed = notices.tolist()
    if failed:
        run.saver.wait()
        raise SaveError("a checkpoint could not be written on another rank; its log in logs/ says why")
    if not any(came):
        return
    _save(run, counters)
    _finish_saving(run)
    names = " and ".join(name for name, ranks in zip(NAMES, came, strict=True) if ranks)
    raise SignalStop(f"{names}: saved at step {counters.step}; continue with {typed('resume', run.folder)}")


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
    _finish_saving(run)
    checkpoints, policy, place = run.folder / "checkpoints", run.recipe.monitor.policy, build.second_place(run.recipe)
    path, skipped = newest_whole(checkpoints, run.saver.team, place, before=decision.since)
    for reason in skipped:
        run.watch.record("checkpoint_skipped", counters.step, reason=reason)
    if path is None:
        _stop(
            run,
            counters,
            replace(decision, reason=f"there is no checkpoint before step {decision.since}; {decision.reason}"),
        )
    start = build.broadcast_from_rank0(lambda: counters_from_dict(read_manifest(path).counters))
    stages, step = run.recipe.stages, counters.step + 1
    new = bad_windows(stages, start, run.windows, decision.since, policy.rewind_before, step)
    build.broadcast_from_rank0(lambda: put_aside(checkpoints, start.step))
    run.saver.went_back(start.step)
    run.engine.load(lambda tensors: run_on_all_ranks(lambda: load(path, tensors)))
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
    _finish_saving(run)
    path = run.folder / "checkpoints" / step_name(counters.step)
    if not doubtful and not build.broadcast_from_rank0(path.exists):
        _save(run, counters)
        _finish_saving(run)
    kept = "nothing was saved" if doubtful else f"saved at step {counters.step}"
    raise PolicyStop(
        f"step {counters.step + 1}: {decision.reason}; the policy ends the run, {kept}; look at the report and change monitor.policy "
        f"or the learning rate; {build.broadcast_from_rank0(lambda: way_back(run.folder))}"
    )


def _refuse(run: Run, counters: Counters, layer: int, rank: int) -> NoReturn:
    """End the run at a step whose router logits were not finite; nothing is saved, the weights may be no use."""
    _finish_saving(run)
    raise RouterError(
        f"step {counters.step + 1}: router logits of layer {layer} are NaN or infinite on rank {rank}; nothing was saved; "
        f"lower the learning rate or set limits for activations; {build.broadcast_from_rank0(lambda: way_back(run.folder))}"
    )


def _refuse_masked(run: Run, counters: Counters, samples: range) -> NoReturn:
    """End the run at a step whose global batch has no target to learn from; its weights were not moved."""
    _finish_saving(run)
    name = counters.stage
    sources = ", ".join(run.loader.tokens_by_source(name, samples))
    raise MaskedError(
        f"step {counters.step + 1}: all weights of the batch are 0 (stage {name}, sources {sources}); at least one target of each batch "
        f"must have a positive weight: correct the weights of these sources, or raise stages.{name}.batch_size; "
        f"{build.broadcast_from_rank0(lambda: way_back(run.folder))}"
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
        **result.terms,
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
    layout = run.meshes.layout
    run.saver.save(
        counters.step,
        run.engine.state,
        before=run.watch.flush,
        counters=replace(counters, watch=run.watch.state()).to_dict(),
        recipe_hash=recipe_hash(run.recipe),
        layout={"world_size": layout.world_size, "dense": layout.dense, "expert": layout.expert},
    )
    _record_saved(run)


def _finish_saving(run: Run) -> None:
    """Wait until what is being saved is on disk."""
    run.saver.wait()
    _record_saved(run)


def _record_saved(run: Run) -> None:
    for saved in run.saver.took():
        run.watch.record(saved.event, saved.step, **saved.evidence)
