"""The native engine and DeepSpeed's ZeRO 1, 2 and 3 on two ranks: losses of the same 20 steps beside each other, and
tokens a second.

    python benchmarks/engines.py [--steps N]

All engines train on the same random tokens from the same weights in fp32, in shapes of step3p5_mini, with two
micro-batches a rank and a step. Each rank has one thread and a core of its own. Engines take turns, step by step, so
that whatever else the machine does meets all of them; the first step of each is not timed. Communication is gloo over
loopback.

Rows' gradients a b on rank 0 and c d on rank 1 are added as (a + c) + (b + d) by the native engine and ZeRO 2 and 3,
which sum over ranks after each micro-batch, and as (a + b) + (c + d) by ZeRO 1, which does so once. The last bit
differs, and among hundreds of experts with near ties a token then goes elsewhere. So there is a second native engine,
with a c on rank 0 and b d on rank 1, which adds as ZeRO 1 does: how far the two native ones are from each other is what
the order of addition costs, and each ZeRO stage is held against the one of its own order.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from steptron.config.resolve import resolve
from steptron.config.schema import LimitsConfig, Recipe
from steptron.model.heads import TokenLoss
from steptron.parallel.mesh import Meshes, build_meshes, data_rank, resolve_layout
from steptron.prove.trial import make_rows
from steptron.train.batch import row_ranges, step_batch, step_settings
from steptron.train.device import keep_heap
from steptron.train.engines import Engine, build_engine
from steptron.train.step import Lenient, StepResult, train_step

RANKS, T, ROWS = 2, 256, 4
NATIVE, DEALT = "native", "native, rows dealt"
ENGINES = {
    NATIVE: ["engine=native"],
    DEALT: ["engine=native"],
    **{f"ZeRO {zero}": ["engine=deepspeed", f"deepspeed.zero={zero}"] for zero in (1, 2, 3)},
}
SAME_ORDER = {"ZeRO 1": DEALT, "ZeRO 2": NATIVE, "ZeRO 3": NATIVE}
NEAR = 1e-5
"""Goal for each ZeRO stage: every step's loss is that near to the native one that adds in the same order."""


def main() -> int:
    """Print both tables and the goals met; 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of each engine")
    steps = parser.parse_args().steps
    losses, seconds = measure(steps)
    console = Console(width=120)
    table = Table(title=f"losses of {steps} steps, {RANKS} ranks, fp32")
    for column in ("step", *ENGINES):
        table.add_column(column, justify="right")
    for step in range(steps):
        table.add_row(str(step + 1), *(f"{losses[name][step]:.7f}" for name in ENGINES))
    off = {name: farthest(losses[name], losses[NATIVE]) for name in ENGINES}
    table.add_row("off native by", *(f"{off[name]:.1e}" for name in ENGINES))
    off = {name: farthest(losses[name], losses[native]) for name, native in SAME_ORDER.items()}
    table.add_row("off same order by", *(f"{off[name]:.1e}" if name in off else "" for name in ENGINES))
    console.print(table)
    table = Table(title=f"step3p5_mini's shapes, 4 layers, {ROWS} rows of {T} tokens a step")
    for column in ("engine", "tokens/s: median (range)", "against native"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    rates = {name: [ROWS * T / s for s in seconds[name][1:]] for name in ENGINES}
    for name, by_step in rates.items():
        ratio = statistics.median(a / b for a, b in zip(by_step, rates[NATIVE], strict=True))
        median = statistics.median(by_step)
        table.add_row(name, f"{median:.0f} ({min(by_step):.0f} to {max(by_step):.0f})", f"{ratio:.2f}")
    console.print(table)
    met = sum(off[name] <= NEAR for name in SAME_ORDER)
    print(f"goals: {met} of {len(SAME_ORDER)} met")
    return 0 if met == len(SAME_ORDER) else 1


def farthest(losses: list[float], others: list[float]) -> float:
    """The largest relative difference of any step."""
    return max(abs(a / b - 1) for a, b in zip(losses, others, strict=True))


def recipe(changes: list[str]) -> Recipe:
    """The mini recipe with one stage of these rows."""
    mini = resolve("step3p5_mini", ["precision=fp32", "optim.matrix_optimizer=adamw", *changes])
    stage = replace(
        next(iter(mini.stages.values())), seq_len=T, batch_size=ROWS, micro_batch=1, ramp=(), limits=LimitsConfig()
    )
    return replace(mini, model=replace(mini.model, num_layers=4), stages={"base": stage})


def measure(steps: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """By engine: losses of all steps, and their seconds (the slowest rank's)."""
    with tempfile.TemporaryDirectory() as folder:
        answers = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_rank, (steps, str(Path(folder) / "store"), answers), nprocs=RANKS)  # pyright: ignore[reportPrivateImportUsage]
        found = [answers.get() for _ in range(RANKS)]
    losses = found[0][0]
    seconds = {
        name: [max(times) for times in zip(*(times[name] for _, times in found), strict=True)] for name in ENGINES
    }
    return losses, seconds


def _rank(rank: int, steps: int, store: str, answers) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    keep_heap()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=300)
    )
    recipes = {name: recipe(changes) for name, changes in ENGINES.items()}
    meshes = build_meshes(resolve_layout(recipes[NATIVE].parallel, RANKS), "cpu")
    engines = {name: build_engine(found, meshes, torch.device("cpu")) for name, found in recipes.items()}
    losses: dict[str, list[float]] = {name: [] for name in ENGINES}
    seconds: dict[str, list[float]] = {name: [] for name in ENGINES}
    for step in range(steps):
        for name, engine in engines.items():
            dist.barrier()
            start = time.perf_counter()
            losses[name].append(_step(recipes[name], engine, meshes, step, dealt=name == DEALT).terms["total_loss"])
            seconds[name].append(time.perf_counter() - start)
    answers.put((losses, seconds))
    os._exit(0)  # torch's threads may not outlive the interpreter


def _step(small: Recipe, engine: Engine, meshes: Meshes, step: int, *, dealt: bool) -> StepResult:
    stage, me, ranks = small.stages["base"], data_rank(meshes), meshes.layout.data_ranks
    if step == 0:
        engine.network.apply_stage(stage, num_groups=1)
    by_rank = [row_ranges(step * ROWS, ROWS, stage.micro_batch, rank, ranks) for rank in range(ranks)]
    ranges = [one[me] for one in by_rank] if dealt else by_rank[me]
    batches = [make_rows(small, "base", indices) for indices in ranges]
    settings = step_settings(stage, step * ROWS * T, ROWS, small.optim.clip_norm)
    return train_step(engine, step_batch(batches, T, meshes, torch.device("cpu")), settings, Lenient(), TokenLoss())


if __name__ == "__main__":
    sys.exit(main())
