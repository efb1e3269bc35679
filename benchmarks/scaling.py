"""A training step on 1, 2 and 4 ranks of this machine, one kind of parallelism at a time; and how much of it
communication takes.

    python benchmarks/scaling.py [--steps N]

The same global batch is trained on by every layout (strong scaling), in fp32, on random tokens, in shapes of
step3p5_mini. Each rank has one thread and is pinned to a core: rank r to core r mod the cores there are. So ranks
beyond the cores share them, and cannot be faster than as many ranks as cores: those rows show what splitting costs, not
what it gains. Communication is gloo over loopback, which a core has to copy itself; its share is that of the step's
time in which a collective of the rank is under way, waiting for others included.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from steptron.config.resolve import resolve
from steptron.config.schema import DenseMeshConfig, ExpertMeshConfig, LimitsConfig, ParallelConfig, Recipe
from steptron.model.heads import TokenLoss
from steptron.parallel.mesh import build_meshes, data_rank, resolve_layout
from steptron.prove.trial import make_rows
from steptron.train.batch import row_ranges, step_batch, step_settings
from steptron.train.device import keep_heap
from steptron.train.engines import build_engine
from steptron.train.step import Lenient, train_step

T, ROWS = 256, 4
GOAL = 1.5
"""Two ranks on two cores, data parallel, against one rank on one."""


def layouts() -> dict[str, tuple[int, ParallelConfig]]:
    """Name → ranks and layout."""
    dense, expert = DenseMeshConfig, ExpertMeshConfig
    return {
        "one rank": (1, ParallelConfig()),
        "dp 2": (2, ParallelConfig()),
        "dp 2, ep 2": (2, ParallelConfig(expert=expert(ep=2))),
        "tp 2": (2, ParallelConfig(dense=dense(tp=2))),
        "cp 2": (2, ParallelConfig(dense=dense(cp=2))),
        "pp 2": (2, ParallelConfig(pp=2)),
        "dp 4": (4, ParallelConfig()),
        "dp 4, ep 4": (4, ParallelConfig(expert=expert(ep=4))),
        "dp 2, tp 2, ep 4": (4, ParallelConfig(dense=dense(tp=2), expert=expert(ep=4))),
        "pp 2, cp 2, ep 2": (4, ParallelConfig(pp=2, dense=dense(cp=2), expert=expert(ep=2))),
    }


def main() -> int:
    """Print the table and the goal met; 1 where it is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each layout")
    steps = parser.parse_args().steps
    cores = len(os.sched_getaffinity(0))
    table = Table(title=f"step3p5_mini's shapes, 4 layers, {ROWS} rows of {T} tokens a step, {cores} cores")
    for column in ("layout", "ranks", "a core has", "tokens/s: median (range)", "against one rank", "communication"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    rates: dict[str, float] = {}
    for name, (ranks, parallel) in layouts().items():
        seconds, share = measure(ranks, parallel, steps)
        by_step = [ROWS * T / s for s in seconds]
        rates[name] = statistics.median(by_step)
        table.add_row(
            name,
            str(ranks),
            f"{-(-ranks // cores)} rank{'s' if ranks > cores else ''}",
            f"{rates[name]:.0f} ({min(by_step):.0f} to {max(by_step):.0f})",
            f"{rates[name] / rates['one rank']:.2f}",
            f"{share:.0%}",
        )
    Console(width=120).print(table)
    met = cores >= 2 and rates["dp 2"] / rates["one rank"] >= GOAL
    print(f"goals: {int(met)} of 1 met")
    return 0 if met else 1


def recipe(parallel: ParallelConfig) -> Recipe:
    """The mini recipe with one stage of these rows."""
    mini = resolve("step3p5_mini", ["precision=fp32", "optim.matrix_optimizer=adamw"])
    stage = replace(
        next(iter(mini.stages.values())), seq_len=T, batch_size=ROWS, micro_batch=1, ramp=(), limits=LimitsConfig()
    )
    small = replace(mini.model, num_layers=4)
    return replace(mini, model=small, stages={"base": stage}, parallel=parallel)


def measure(ranks: int, parallel: ParallelConfig, steps: int) -> tuple[list[float], float]:
    """Seconds of each step (the slowest rank's), and the mean share of them in which a rank communicates."""
    with tempfile.TemporaryDirectory() as folder:
        answers = mp.get_context("spawn").SimpleQueue()
        arguments = (ranks, parallel, steps, str(Path(folder) / "store"), answers)
        mp.spawn(_rank, arguments, nprocs=ranks)  # pyright: ignore[reportPrivateImportUsage]
        found = [answers.get() for _ in range(ranks)]
    seconds = [max(times) for times in zip(*(times for times, _ in found), strict=True)]
    return seconds, statistics.mean(share for _, share in found)


def _rank(rank: int, ranks: int, parallel: ParallelConfig, steps: int, store: str, answers) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    keep_heap()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=300)
    )
    step = our_step(recipe(parallel), ranks)
    step()  # warms up
    seconds = [_timed(step) for _ in range(steps)]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        whole = _timed(step)
    answers.put((seconds, _communicating(profiled) / whole))
    os._exit(0)  # torch's threads may not outlive the interpreter


def our_step(small: Recipe, ranks: int) -> Callable[[], object]:
    """A function that takes one step of the loop's own on this rank."""
    device, (name, stage) = torch.device("cpu"), next(iter(small.stages.items()))
    meshes = build_meshes(resolve_layout(small.parallel, ranks), "cpu")
    engine = build_engine(small, meshes, device)
    engine.network.apply_stage(stage, num_groups=1)
    settings = step_settings(stage, 0, ROWS, small.optim.clip_norm)
    rows = row_ranges(0, ROWS, stage.micro_batch, data_rank(meshes), meshes.layout.data_ranks)
    batches = [make_rows(small, name, indices) for indices in rows]
    return lambda: train_step(engine, step_batch(batches, T, meshes, device), settings, Lenient(), TokenLoss())


def _timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _communicating(profiled: profile) -> float:
    """Seconds in which at least one collective was under way."""
    spans = sorted(
        (e.time_range.start, e.time_range.end) for e in profiled.events() or () if e.name.startswith("gloo:")
    )
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6


if __name__ == "__main__":
    sys.exit(main())
