"""The run as a list of stages: what `steptron train` and `steptron resume` call on every rank.

counters → stage → settings of the step → step.py → counters, metrics, checkpoint
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from steptron.checkpoint.load import find_whole, load, load_part, newest_whole
from steptron.checkpoint.manifest import read_manifest
from steptron.checkpoint.save import save
from steptron.config.decode import encode
from steptron.config.resolve import recipe_hash
from steptron.config.schema import Recipe, StageConfig, moe_layers
from steptron.data.curriculum import batch_size_at
from steptron.data.loader import Batch, Loader, Prefetcher
from steptron.errors import DataError, RouterError, SteptronError
from steptron.model.flops import flops_per_token
from steptron.model.inputs import Inputs, count_targets
from steptron.optim.groups import Optimizer, build_optimizer
from steptron.optim.schedule import bias_rate, learning_rate
from steptron.parallel.apply import build_network
from steptron.parallel.collectives import limit_all_groups, together
from steptron.parallel.cp import sequence_pieces
from steptron.parallel.mesh import Meshes, data_rank
from steptron.parallel.network import Network
from steptron.parallel.watchdog import Whereabouts, watch_ranks
from steptron.train import build
from steptron.train.peak import peak_flops
from steptron.train.state import Counters, counters_from_dict
from steptron.train.step import StepBatch, StepResult, StepSettings, train_step
from steptron.train.watch import Silent, Watch

log = logging.getLogger("steptron")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The components of a run on one rank."""

    recipe: Recipe
    folder: Path
    meshes: Meshes
    network: Network
    optimizer: Optimizer
    loader: Loader
    watch: Silent
    peak: float | None
    whereabouts: Whereabouts


def train(recipe: Recipe) -> int:
    """Start a run and go through all its stages. Returns the exit code."""
    device = build.pick_device(recipe)
    with build.ranks(recipe, device) as meshes:
        recipe = build.pin_groups(recipe, meshes.layout)
        loader = together(lambda: build.build_loader(recipe))
        folder = together(lambda: build.claim_run_dir(recipe))
        counters = Counters(data=loader.fingerprint)
        with _assemble(recipe, folder, meshes, device, loader, counters, resumed=None) as run:
            start = recipe.checkpoint.start
            if start:
                source = together(lambda: find_whole(Path(start)))
                together(lambda: load_part(source, _weights(run)))
                run.network.values_changed()
            run.watch.record("run_start", 0, world_size=dist.get_world_size(), data=loader.fingerprint, weights=start)
            return _run_stages(run, counters)


def resume(recipe: Recipe, folder: Path, changes: dict) -> int:
    """Continue the run in `folder` from its newest whole checkpoint, or from the start where there is none yet.

    `recipe` is the resolved recipe with the user's changes in it; `changes` (key → [old, new]) goes to the ledger."""
    device = build.pick_device(recipe)
    with build.ranks(recipe, device) as meshes:
        recipe = build.pin_groups(recipe, meshes.layout)
        loader = together(lambda: build.build_loader(recipe))
        found = together(lambda: _find_checkpoint(folder))
        counters = _counters(found.path, loader)
        with _assemble(recipe, folder, meshes, device, loader, counters, resumed=counters.step) as run:
            for reason in found.skipped:
                run.watch.record("checkpoint_skipped", counters.step, reason=reason)
            if (path := found.path) is not None:
                together(lambda: load(path, _tensors(run)))
                run.network.values_changed()
            if changes and dist.get_rank() == 0:
                build.write_recipe(recipe, folder)
            name = path.name if path else None
            run.watch.record(
                "resume", counters.step, checkpoint=name, changes=changes, world_size=dist.get_world_size()
            )
            return _run_stages(run, counters)


@contextmanager
def _assemble(
    recipe: Recipe,
    folder: Path,
    meshes: Meshes,
    device: torch.device,
    loader: Loader,
    counters: Counters,
    resumed: int | None,
) -> Iterator[Run]:
    handler = build.log_to_file(folder)
    network = build_network(recipe, meshes, device)
    first = dist.get_rank() == 0
    watch = Watch(recipe, folder, list(moe_layers(recipe.model)), counters.tokens, resumed) if first else Silent()
    peak = recipe.monitor.peak_tflops * 1e12 if recipe.monitor.peak_tflops else peak_flops(device, recipe.precision)
    try:
        with watch_ranks(recipe.run.timeout_s) as whereabouts:
            whereabouts.enter(counters.step, "start")
            optimizer = build_optimizer(dict(network.named_parameters()), recipe.optim)
            limit_all_groups(recipe.run.timeout_s)
            yield Run(
                recipe=recipe,
                folder=folder,
                meshes=meshes,
                network=network,
                optimizer=optimizer,
                loader=loader,
                watch=watch,
                peak=peak,
                whereabouts=whereabouts,
            )
    except SteptronError as error:
        watch.record("run_end", watch.last_step, reason=str(error))
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
    names = list(run.recipe.stages)
    first = names.index(counters.stage) if counters.stage else 0
    for name in names[first:]:
        if counters.stage != name:
            counters = counters.enter_stage(name)
        counters = _run_stage(run, name, counters)
    run.watch.record("run_end", counters.step, tokens=counters.tokens, tokens_by_source=counters.tokens_by_source)
    return 0


def _run_stage(run: Run, name: str, counters: Counters) -> Counters:
    """Steps until the stage's budget is reached; a checkpoint at its end."""
    stage = run.recipe.stages[name]
    if counters.stage_tokens >= stage.tokens:
        return counters
    run.network.apply_stage(stage, num_groups=run.meshes.layout.expert["ep"])
    run.watch.record("stage_start", counters.step, stage=name, tokens=counters.tokens, settings=encode(stage))
    flops = flops_per_token(run.recipe.model, stage.seq_len)
    saved = counters.step
    with Prefetcher(run.loader, _micro_batches(run, name, counters)) as prefetcher:
        ready = iter(prefetcher)
        while counters.stage_tokens < stage.tokens:
            start = time.perf_counter()
            run.whereabouts.enter(counters.step + 1, "data")
            rows = batch_size_at(stage, counters.stage_tokens)
            settings = step_settings(run.recipe, stage, counters.stage_tokens, rows)
            batches = [next(ready) for _ in range(rows // (stage.micro_batch * run.meshes.layout.data_ranks))]
            run.whereabouts.enter(counters.step + 1, "training step")
            batch = step_batch(batches, stage.seq_len, run.meshes, run.network.device)
            try:
                result = train_step(run.network, run.optimizer, batch, settings)
            except RouterError as error:
                raise RouterError(f"step {counters.step + 1}: {error}") from error
            by_source = run.loader.tokens_by_source(name, range(counters.stage_samples, counters.stage_samples + rows))
            counters = counters.after_step(rows, stage.seq_len, by_source)
            _report(run, name, counters, settings, result, by_source, time.perf_counter() - start, flops)
            if counters.step % run.recipe.checkpoint.every == 0:
                _save(run, counters)
                saved = counters.step
    if saved != counters.step:
        _save(run, counters)
    return counters


def _micro_batches(run: Run, name: str, counters: Counters) -> Iterator[tuple[str, range]]:
    """Sample indices of this rank's micro-batches, from the next step to the stage's end: a function of the counters alone."""
    stage, ranks, rank = run.recipe.stages[name], run.meshes.layout.data_ranks, data_rank(run.meshes)
    tokens, first = counters.stage_tokens, counters.stage_samples
    while tokens < stage.tokens:
        rows = batch_size_at(stage, tokens)
        for indices in row_ranges(first, rows, stage.micro_batch, rank, ranks):
            yield name, indices
        tokens, first = tokens + rows * stage.seq_len, first + rows


def row_ranges(first: int, rows: int, micro_batch: int, rank: int, ranks: int) -> list[range]:
    """Sample indices of each micro-batch of one of `ranks` data-parallel ranks, of the global batch of `rows` that starts at `first`."""
    starts = range(first + rank * micro_batch, first + rows, ranks * micro_batch)
    return [range(start, start + micro_batch) for start in starts]


def step_batch(batches: list[Batch], seq_len: int, meshes: Meshes, device: torch.device) -> StepBatch:
    """What this rank's model reads of its rows, and the targets of the global batch.

    The rows are the same on all ranks of a cp, tp and pp group: a sum over all ranks counts them that often."""
    cp = meshes.dense["cp"]
    pieces = sequence_pieces(seq_len, cp.size(), cp.get_local_rank())
    targets_H = torch.stack([count_targets(batch.documents_BS, seq_len) for batch in batches]).sum(0).to(device)
    dist.all_reduce(targets_H)
    return StepBatch(
        inputs=[Inputs.from_rows(batch.tokens_BS, batch.documents_BS, seq_len, pieces) for batch in batches],
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


def _report(
    run: Run,
    name: str,
    counters: Counters,
    settings: StepSettings,
    result: StepResult,
    by_source: dict[str, int],
    seconds: float,
    flops: float,
) -> None:
    batch_tokens = settings.batch_size * settings.seq_len
    rate = batch_tokens / seconds
    metrics = {
        "step": counters.step,
        "stage": name,
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
    }
    run.watch.step(metrics, result.expert_counts_LE.numpy(), by_source)


def _weights(run: Run) -> dict[str, torch.Tensor]:
    """Parameters and buffers by their names in a checkpoint; loaded in place."""
    return {f"model.{name}": tensor for name, tensor in run.network.state().items()}


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    """Everything a checkpoint holds besides the counters, by name; loaded in place."""
    return _weights(run) | {f"optimizer.{name}": tensor for name, tensor in run.optimizer.state().items()}


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
        tensors=_tensors(run),
        counters=counters.to_dict(),
        recipe_hash=recipe_hash(run.recipe),
        layout=layout,
        keep=run.recipe.checkpoint.keep,
        together=together,
    )
    run.watch.record("checkpoint", counters.step, path=path.name, seconds=round(time.perf_counter() - start, 3))


@dataclass(frozen=True)
class _Found:
    path: Path | None
    skipped: list[str]


def _find_checkpoint(folder: Path) -> _Found:
    """What rank 0 sees as the newest whole checkpoint, the same on all ranks."""
    found: list[_Found | None] = [None]
    if dist.get_rank() == 0:
        found[0] = _Found(*newest_whole(folder / "checkpoints"))
    dist.broadcast_object_list(found)
    assert found[0] is not None, "rank 0 has looked"
    return found[0]
