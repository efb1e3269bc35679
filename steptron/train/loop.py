"""The stages of a run, from counters to the end, on every rank.

    counters → stage → settings of the step → step.py → decision ─┬─ counters, evaluation, metrics, checkpoint
                                                                  └─ rewind: counters of a checkpoint, bad data left out

At a stage with another layout the run is closed and resumed: the command builds it again over the same ranks. If the
stage has another number of ranks, the command ends, and its launcher starts that number.

A signal, or a checkpoint that could not be written, ends the run after the same step on all ranks: the first all-reduce
of each step tells all ranks.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import NoReturn

import torch.distributed as dist

from steptron.checkpoint.find import newest_complete, put_aside, way_back
from steptron.checkpoint.load import load
from steptron.checkpoint.manifest import read_manifest, step_name
from steptron.config.changes import recipe_hash
from steptron.config.decode import encode
from steptron.config.layouts import parallel_of
from steptron.config.schema import trained_heads
from steptron.data.curriculum import StepPlan, coming_steps
from steptron.data.loader import Prefetcher
from steptron.errors import MaskedError, PolicyStop, RouterError, SaveError, SignalStop, typed
from steptron.model.flops import flops_per_token
from steptron.monitor.detect.policy import Decision
from steptron.monitor.statistics.frame import Scalar
from steptron.parallel.collectives import broadcast_from_rank0, gather_numbers, run_on_all_ranks
from steptron.parallel.mesh import data_rank
from steptron.train.batch import Prepared, Preparer, joined, row_ranges, step_settings, unmasked_by_source
from steptron.train.counters import Counters, counters_from_dict
from steptron.train.device import peak_memory, reset_peak_memory
from steptron.train.evaluate import evaluate
from steptron.train.mirror_remote import mirror_remote
from steptron.train.new_heads import copy_first_head, new_heads
from steptron.train.process_group import refuse_other_ranks
from steptron.train.profile import Profile
from steptron.train.rewind import bad_windows
from steptron.train.run import Run
from steptron.train.signals import NAMES
from steptron.train.step import StepResult, StepSettings, train_step

NOTHING = range(0)
GIB = 1 << 30
_FEW_RANKS = 8
"""The most ranks whose memory is shown one by one."""


class _Rewind(Exception):
    """Ends the steps of a stage, because the run must go back. It has the counters before the step and the decision."""

    def __init__(self, counters: Counters, decision: Decision):
        self.counters, self.decision = counters, decision


def rehearse(run: Run, counters: Counters) -> None:
    """Do what comes before the first step: set the network to its stage, and read its data."""
    coming = next(_coming(run, counters))
    if coming.stage != counters.stage:
        counters = _enter(run, counters, coming.stage)
    run.network.apply_stage(run.recipe.stages[coming.stage], num_groups=run.meshes.layout.expert["ep"])
    with _prefetched(run, counters) as prefetcher:
        next(iter(prefetcher))


def run_stages(run: Run, counters: Counters, profiled: range = NOTHING) -> bool:
    """Train all stages of the run's layout, with a checkpoint at the end of each. Return whether the run is at its end.

    Otherwise the stage that comes has another layout: the caller must close this run, and resume it. `profiled`: the
    steps to write a profile of. Raises `SignalStop`, `PolicyStop`, `SaveError`, or `OtherRanks` before a stage with
    another number of ranks, on all ranks.
    """
    run.recorder.record("detectors", counters.step, **run.guard.in_force)
    with Profile(profiled, run.folder) as profile:
        while (coming := next(_coming(run, counters), None)) is not None:
            if parallel_of(run.recipe, coming.stage) != run.parallel:
                break
            if coming.stage != counters.stage:
                counters = _enter(run, counters, coming.stage)
            counters = _begin_stage(run, counters)
            saved = counters.step
            try:
                with _prefetched(run, counters) as prefetcher:
                    ready = iter(prefetcher)
                    for plan in _stage_plans(run, counters):
                        with profile.step(counters.step + 1):
                            counters = run_step(run, counters, plan.samples, ready)
                        if counters.step % run.recipe.checkpoint.every == 0:
                            _save(run, counters)
                            saved = counters.step
                _end_stage(run, counters)
                if saved != counters.step:
                    _save(run, counters)
            except _Rewind as rewind:
                run, counters = _rewind(run, rewind.counters, rewind.decision)
    _finish_saving(run)
    run.saver.close(run.recipe.run.timeout_s)  # also waits for the mirror
    _record_saved(run)
    if coming is not None:
        ranks = parallel_of(run.recipe, coming.stage).ranks or dist.get_world_size()
        run.recorder.record("new_layout", counters.step, stage=coming.stage, ranks=ranks)
        refuse_other_ranks(run.recipe, coming.stage, run.folder)
        return False
    run.recorder.record(
        "run_end",
        counters.step,
        tokens=counters.tokens,
        tokens_by_source=counters.tokens_by_source,
        sources=counters.sources,
    )
    return True


def run_step(run: Run, counters: Counters, samples: range, ready: Iterator[Prepared]) -> Counters:
    """Train one step on these samples, and return the counters after it. `ready`: the micro-batches of this rank.

    Raises `_Rewind`, `PolicyStop`, `RouterError` or `MaskedError` if the step must not count.
    """
    name = counters.stage
    stage = run.recipe.stages[name]
    run.clock.drop()  # the waits since the last step are not part of this one
    start = time.perf_counter()
    run.status.enter(counters.step + 1, "data")
    settings = step_settings(stage, counters.stage_tokens, len(samples), run.recipe.optim.clip_norm)
    prepared = [next(ready) for _ in range(len(samples) // (stage.micro_batch * run.meshes.layout.data_ranks))]
    data_wait = time.perf_counter() - start
    run.status.enter(counters.step + 1, "training step")
    run.guard.begin(counters.step + 1, name)
    sources = run.loader.sources
    batches = [one.batch for one in prepared]
    notices = [*run.signals.came, int(run.saver.failed), *unmasked_by_source(batches, stage.seq_len, sources)]
    batch = joined(prepared, stage.seq_len, run.meshes, run.network.device, notices)
    result = train_step(run.engine, batch, settings, run.guard, run.loss)
    if result.overflow:
        run.recorder.record("step_repeated", counters.step + 1, choices=result.overflow)
    if not result.target_weight:
        _refuse_masked(run, counters, samples)
    decision = run.guard.decision
    if decision.act == "rewind":
        raise _Rewind(counters, decision)
    if result.broken is not None:
        _refuse(run, counters, *result.broken)
    if decision.act == "stop":
        _stop(run, counters, decision)
    run.guard.apply_limits(run.network)
    told = batch.notices.tolist()
    copies = run.meshes.layout.world_size // run.meshes.layout.data_ranks
    unmasked = {source: round(count / copies) for source, count in zip(sources, told[-len(sources) :], strict=True)}
    by_source = run.loader.tokens_by_source(name, samples)
    counters = counters.after_step(samples, stage.seq_len, by_source, unmasked, run.loader.epoch_tokens(name))
    seconds, waited = time.perf_counter() - start, run.clock.take()
    metrics = _metrics(run, counters, settings, result, seconds) | _evaluate(run, counters)
    run.recorder.step(metrics, by_source, run.guard.vital, data_wait, waited)
    _record_saved(run)
    _heed(run, counters, told[: -len(sources)])
    return counters


def _evaluate(run: Run, counters: Counters) -> dict[str, Scalar]:
    """Evaluate the run if it is due after this step, and return the scalars by name."""
    config, stage = run.recipe.evaluation, run.recipe.stages[counters.stage]
    due = counters.step % config.every == 0 or counters.stage_tokens >= stage.tokens
    if not run.texts or not due:
        return {}
    start = time.perf_counter()
    run.status.enter(counters.step, "evaluation")
    found = evaluate(
        run.network,
        run.meshes,
        run.texts,
        tokens=config.tokens,
        seq_len=stage.seq_len,
        micro_batch=stage.micro_batch,
        mtp_heads=trained_heads(run.recipe.model, stage),
    )
    run.recorder.record(
        "evaluation",
        counters.step,
        loss=found.loss(),
        by_source={name: found.loss(name) for name in found.names},
        targets=found.targets(),
        seconds=round(time.perf_counter() - start, 3),
    )
    return dict(found.scalars())


def _enter(run: Run, counters: Counters, stage: str) -> Counters:
    """Return the counters at the first step of another stage."""
    names = list(run.recipe.stages)
    return counters.enter_stage(stage, run.loader.facts(names[: names.index(stage) + 1]))


def _begin_stage(run: Run, counters: Counters) -> Counters:
    """Set the network to the counters' stage. Return the counters with its number of MTP heads."""
    stage = run.recipe.stages[counters.stage]
    if heads := new_heads(run.recipe, counters):
        _finish_saving(run)
        copy_first_head(run.engine, run.folder / "checkpoints" / step_name(counters.step), heads)
    run.network.apply_stage(stage, num_groups=run.meshes.layout.expert["ep"])
    run.guard.apply_limits(run.network)
    reset_peak_memory(run.network.device)
    run.recorder.record(
        "stage_start",
        counters.step,
        stage=counters.stage,
        tokens=counters.tokens,
        settings=encode(stage),
        **({"copied_heads": list(heads)} if heads else {}),
    )
    return replace(counters, mtp_heads=trained_heads(run.recipe.model, stage))


def _end_stage(run: Run, counters: Counters) -> None:
    """Record and show what the counters' stage has needed on each rank."""
    peaks = [round(peak / GIB, 3) for peak in gather_numbers(peak_memory(run.network.device), run.network.device)]
    run.recorder.record("stage_end", counters.step, stage=counters.stage, peak_memory_gib=peaks)
    run.recorder.say(f"stage {counters.stage} done at step {counters.step:,} · peak memory {_of_ranks(peaks)}")


def _of_ranks(gib: Sequence[float]) -> str:
    """Return the memory of each of a few ranks in their order, or the least and the most of many."""
    if len(gib) <= _FEW_RANKS:
        ranks = f" (ranks 0 to {len(gib) - 1})" if len(gib) > 1 else ""
        return f"{', '.join(f'{each:.1f}' for each in gib)} GiB{ranks}"
    least, most = min(gib), max(gib)
    return f"{least:.1f} GiB (rank {gib.index(least)}) to {most:.1f} GiB (rank {gib.index(most)})"


def _heed(run: Run, counters: Counters, notices: Sequence[float]) -> None:
    """End the run if a rank was told to stop, or could not write a checkpoint."""
    *came, failed = notices
    if failed:
        run.saver.wait()
        raise SaveError("a checkpoint could not be written on another rank; its log in logs/ says why")
    if not any(came):
        return
    _save(run, counters)
    _finish_saving(run)
    names = " and ".join(name for name, ranks in zip(NAMES, came, strict=True) if ranks)
    raise SignalStop(f"{names}: saved at step {counters.step}; continue with {typed('resume', run.folder)}")


def _coming(run: Run, counters: Counters) -> Iterator[StepPlan]:
    return coming_steps(run.recipe.stages, counters, run.windows)


def _stage_plans(run: Run, counters: Counters) -> Iterator[StepPlan]:
    """Return the steps from here to the end of the counters' stage."""
    return takewhile(lambda plan: plan.stage == counters.stage, _coming(run, counters))


def _prefetched(run: Run, counters: Counters) -> Prefetcher[Prepared]:
    """Return this rank's micro-batches, to the end of the counters' stage.

    While a step runs, a thread prepares those of the next one and copies them to the device.
    """
    recipe, stage, layout = run.recipe, run.recipe.stages[counters.stage], run.meshes.layout
    heads = trained_heads(recipe.model, stage)
    prepare = Preparer(stage.seq_len, run.meshes, run.network.device, run.loader.sources, heads)
    return Prefetcher(
        lambda name, indices: prepare(run.loader.batch(name, indices)),
        _micro_batches(run, counters),
        depth=max(2, stage.batch_size // (stage.micro_batch * layout.data_ranks)),
    )


def _micro_batches(run: Run, counters: Counters) -> Iterator[tuple[str, range]]:
    """Yield stage and sample indices of this rank's micro-batches, to the end of the counters' stage."""
    ranks, rank = run.meshes.layout.data_ranks, data_rank(run.meshes)
    for plan in _stage_plans(run, counters):
        micro_batch = run.recipe.stages[plan.stage].micro_batch
        for indices in row_ranges(plan.samples.start, len(plan.samples), micro_batch, rank, ranks):
            yield plan.stage, indices


def _rewind(run: Run, counters: Counters, decision: Decision) -> tuple[Run, Counters]:
    """Go back to the newest complete checkpoint before the first bad step. Return the run, which leaves out the data of
    the bad steps from now on, and the counters of that checkpoint."""
    _finish_saving(run)
    checkpoints, policy = run.folder / "checkpoints", run.recipe.monitor.policy
    remote = mirror_remote(run.recipe.checkpoint.mirror_to, run.recipe.run.name)
    path, skipped = newest_complete(checkpoints, run.saver.coordinator, remote, before=decision.since)
    for reason in skipped:
        run.recorder.record("checkpoint_skipped", counters.step, reason=reason)
    if path is None:
        _stop(
            run,
            counters,
            replace(decision, reason=f"there is no checkpoint before step {decision.since}; {decision.reason}"),
        )
    start = broadcast_from_rank0(lambda: counters_from_dict(read_manifest(path).counters))
    stages, step = run.recipe.stages, counters.step + 1
    new = bad_windows(stages, start, run.windows, decision.since, policy.rewind_before, step)
    broadcast_from_rank0(lambda: put_aside(checkpoints, start.step))
    run.saver.went_back(start.step)
    run.engine.load(lambda tensors: run_on_all_ranks(lambda: load(path, tensors)))
    run.recorder.record(
        "rewind",
        step,
        to=start.step,
        checkpoint=path.name,
        windows=[list(window) for window in new],
        reason=decision.reason,
    )
    run.recorder.go_back(start.step)
    run.guard.restore(start.guard)
    return replace(run, windows=(*run.windows, *new)), start


def _stop(run: Run, counters: Counters, decision: Decision) -> NoReturn:
    """End the run before the update of this step. It is saved, unless its weights may be useless."""
    run.guard.undo()
    doubtful = any(alarm.detector == "not_finite" for alarm in decision.alarms)
    _finish_saving(run)
    path = run.folder / "checkpoints" / step_name(counters.step)
    if not doubtful and not broadcast_from_rank0(path.exists):
        _save(run, counters)
        _finish_saving(run)
    kept = "nothing was saved" if doubtful else f"saved at step {counters.step}"
    raise PolicyStop(
        f"step {counters.step + 1}: {decision.reason}; the policy ends the run, {kept}; look at the report and change "
        f"monitor.policy or the learning rate; {broadcast_from_rank0(lambda: way_back(run.folder))}"
    )


def _refuse(run: Run, counters: Counters, layer: int, rank: int) -> NoReturn:
    """End the run at a step whose router logits were not finite. Nothing is saved: the weights may be useless."""
    _finish_saving(run)
    raise RouterError(
        f"step {counters.step + 1}: router logits of layer {layer} are NaN or infinite on rank {rank}; nothing was "
        "saved; lower the learning rate or set limits for activations; "
        f"{broadcast_from_rank0(lambda: way_back(run.folder))}"
    )


def _refuse_masked(run: Run, counters: Counters, samples: range) -> NoReturn:
    """End the run at a step whose global batch has no target to learn from. Its weights were not updated."""
    _finish_saving(run)
    name = counters.stage
    sources = ", ".join(run.loader.tokens_by_source(name, samples))
    raise MaskedError(
        f"step {counters.step + 1}: all weights of the batch are 0 (stage {name}, sources {sources}); at least one "
        "target of each batch must have a positive weight: correct the weights of these sources, or raise "
        f"stages.{name}.batch_size; "
        f"{broadcast_from_rank0(lambda: way_back(run.folder))}"
    )


def _metrics(
    run: Run, counters: Counters, settings: StepSettings, result: StepResult, seconds: float
) -> dict[str, Scalar]:
    """Return the step's line in metrics.jsonl."""
    batch_tokens = settings.batch_size * settings.seq_len
    rate = batch_tokens / seconds
    model, stage = run.recipe.model, run.recipe.stages[counters.stage]
    flops = flops_per_token(model, settings.seq_len, trained_heads(model, stage))
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
        "act": run.guard.decision.act,
    }


def _save(run: Run, counters: Counters) -> None:
    run.status.enter(counters.step, "checkpoint")
    layout = run.meshes.layout
    run.saver.save(
        counters.step,
        run.engine.state,
        before=run.recorder.flush,
        counters=replace(counters, guard=run.guard.state()).to_dict(),
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
        run.recorder.record(saved.event, saved.step, **saved.evidence)
