"""What watching costs: training steps of step3p5_mini with `monitor.level=full` against `off`, in turn, in one process.

    python benchmarks/watching.py [--pairs 12] [--recipe step3p5_mini] [key=value …]

Both runs are whole ones: data is ready, the plane is filled, summed, judged by the detectors, copied and written as Parquet by the
writer thread while the next step computes. A pair is one step of each, whichever comes first alternates; what is printed is the median of
the pairs' ratios with its quartiles.

Goal: median ratio at most 1.02.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from steptron.config.monitoring import WandbConfig
from steptron.config.resolve import resolve
from steptron.config.schema import Recipe
from steptron.data.curriculum import batch_size_at
from steptron.data.loader import Batch
from steptron.parallel.mesh import Meshes
from steptron.train import build
from steptron.train.loop import run_step
from steptron.train.run import Run, assemble, saving_team
from steptron.train.signals import Signals
from steptron.train.state import Counters

GOAL = 1.02
WARM_UP = 2
"""Pairs that are not counted."""


class MadeUp:
    """A loader of random rows, ready at once."""

    fingerprint = "made up"

    def __init__(self, recipe: Recipe):
        self.sources = tuple(recipe.data.sources)
        self._vocab_size, self._heads = recipe.model.vocab_size, 1 + recipe.model.num_mtp_heads

    def tokens_by_source(self, stage: str, samples: range) -> dict[str, int]:
        return {self.sources[0]: len(samples)}

    def batches(self, rows: int, seq_len: int) -> Iterator[Batch]:
        width = seq_len + self._heads
        tokens_BS = torch.randint(self._vocab_size, (rows, width), generator=torch.Generator().manual_seed(0))
        documents_BS = (torch.arange(width) * 3 // width).int().expand(rows, width)
        while True:
            yield Batch(tokens_BS, documents_BS, (self.sources[0],) * rows)


@contextmanager
def stepper(recipe: Recipe, level: str, folder: Path, meshes: Meshes) -> Iterator["Stepper"]:
    """A run of the recipe at that level, ready for its first step."""
    monitor = replace(recipe.monitor, level=level, wandb=WandbConfig(mode="disabled"), flush_every=5)
    recipe = replace(recipe, monitor=monitor)
    loader, counters = MadeUp(recipe), Counters(data="made up")
    folder.mkdir()
    of_kind: Any = loader
    saving = saving_team(recipe)
    with assemble(
        recipe, folder, meshes, torch.device("cpu"), of_kind, counters, Signals(), saving, resumed=None
    ) as run:
        yield Stepper(run, loader, counters)


class Stepper:
    """Makes steps of a run's first stage."""

    def __init__(self, run: Run, loader: MadeUp, counters: Counters):
        name, stage = next(iter(run.recipe.stages.items()))
        self.run, self.counters = run, counters.enter_stage(name)
        self.rows = batch_size_at(stage, 0)
        self.ready = loader.batches(stage.micro_batch, stage.seq_len)
        run.network.apply_stage(stage, num_groups=1)

    def seconds(self) -> float:
        """Of one step."""
        first = self.counters.stage_samples
        start = time.perf_counter()
        self.counters = run_step(self.run, self.counters, range(first, first + self.rows), self.ready)
        return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--recipe", default="step3p5_mini")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    recipe = resolve(args.recipe, args.overrides)
    ratios, seconds = [], {"off": [], "full": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        build.ranks(recipe, torch.device("cpu")) as meshes,
        ExitStack() as stack,
    ):
        runs = {level: stack.enter_context(stepper(recipe, level, Path(folder) / level, meshes)) for level in seconds}
        slots = runs["full"].run.watch.slots
        for pair in range(WARM_UP + args.pairs):
            order = list(runs) if pair % 2 else list(runs)[::-1]
            taken = {level: runs[level].seconds() for level in order}
            if pair >= WARM_UP:
                ratios.append(taken["full"] / taken["off"])
                for level in taken:
                    seconds[level].append(taken[level])
    table = Table(title=f"{args.recipe}: {slots:,} values a step, {args.pairs} pairs")
    for column in ("off, s a step", "full, s a step", "ratio: median", "quartiles"):
        table.add_column(column, justify="right")
    low, _, high = quantiles(ratios, n=4)
    table.add_row(
        f"{median(seconds['off']):.3f}",
        f"{median(seconds['full']):.3f}",
        f"{median(ratios):.4f}",
        f"{low:.4f} to {high:.4f}",
    )
    Console().print(table)
    met = median(ratios) <= GOAL
    print(f"goals: {int(met)} of 1 met (full ÷ off at most {GOAL})")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
