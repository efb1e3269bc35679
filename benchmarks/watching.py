"""What watching costs: training steps of step3p5_mini with `monitor.level=full` against `off`, in turn, a process each.

    python benchmarks/watching.py [--rounds 4] [--pairs 4] [--recipe step3p5_mini] [key=value …]

Both runs are whole ones: data is ready, the plane is filled, summed, judged by the detectors, copied and written as
Parquet by the writer thread, in whosever turn it is then. A pair is one step of each, in pieces that take turns
(micro-batch by micro-batch, then the update), so that what else the machine does meets both alike; whichever comes
first alternates. Each round has new processes, so that nothing that one keeps for life (where its memory lies) stays
with the result. What is printed is the median of all pairs' ratios with its quartiles; beside it the median of each
round, and the ratio of the fastest times, the fastest of each piece, which others disturb least.

Goal: median ratio at most 1.02.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table

from steptron.config import identity
from steptron.config.monitoring import WandbConfig
from steptron.config.resolve import resolve
from steptron.config.schema import Recipe
from steptron.data.curriculum import batch_size_at
from steptron.data.loader import Batch
from steptron.model.inputs import Rows
from steptron.train.batch import Preparer
from steptron.train.counters import Counters
from steptron.train.loop import run_step
from steptron.train.process_group import launched_layouts, make_saving_coordinator, meshes_over, process_group
from steptron.train.run import Run, RunData, assemble
from steptron.train.signals import Signals

GOAL = 1.02
WARM_UP = 2
"""Pairs of a round that are not counted."""


class MadeUp:
    """A loader of random rows, ready at once."""

    fingerprint = "random"

    def __init__(self, recipe: Recipe):
        self.sources = tuple(recipe.data.sources)
        self._vocab_size, self._heads = recipe.model.vocab_size, 1 + recipe.model.num_mtp_heads

    def tokens_by_source(self, stage: str, samples: range) -> dict[str, int]:
        return {self.sources[0]: len(samples)}

    def epoch_tokens(self, stage: str) -> dict[str, int]:
        return dict.fromkeys(self.sources, 1)

    def batches(self, rows: int, seq_len: int) -> Iterator[Batch]:
        width = seq_len + self._heads
        tokens_BS = torch.randint(self._vocab_size, (rows, width), generator=torch.Generator().manual_seed(0))
        documents_BS = (torch.arange(width) * 3 // width).int().expand(rows, width)
        while True:
            yield Batch(Rows.unweighted(tokens_BS, documents_BS), (self.sources[0],) * rows)


class Turns:
    """Halts a run, which is then another's turn: before each micro-batch, before the update, after the step."""

    def __init__(self, run: Run, line: Connection):
        self._line, self._start = line, 0.0
        for model in run.network.parts.values():
            model.register_forward_pre_hook(lambda *_: self.halt())
        update = run.engine.update

        def update_in_turn(norm: torch.Tensor, max_norm: float, lr: float) -> None:
            self.halt()
            update(norm, max_norm, lr)

        run.engine.update = update_in_turn

    def wait(self) -> None:
        """For this run's turn. EOFError: there is none."""
        self._line.recv()
        self._start = time.perf_counter()

    def halt(self, after_step: bool = False) -> None:
        """Tell the seconds since the turn began, and wait for the next one."""
        self._line.send((time.perf_counter() - self._start, after_step))
        self.wait()


def work(recipe: Recipe, level: str, folder: Path, line: Connection) -> None:
    """Steps of the recipe's first stage at that level, in a process of its own; tells the values a step first."""
    monitor = replace(recipe.monitor, level=level, wandb=WandbConfig(mode="disabled"), flush_every=5)
    recipe = replace(recipe, monitor=monitor)
    name, stage = next(iter(recipe.stages.items()))
    loader, rows = MadeUp(recipe), batch_size_at(stage, 0)
    counters, of_kind = Counters(), cast(Any, loader)
    device = torch.device("cpu")
    folder.mkdir()
    with ExitStack() as stack, suppress(EOFError):
        stack.enter_context(process_group(device, recipe.run.timeout_s))
        meshes = meshes_over(next(iter(launched_layouts(recipe).values())), device, recipe.run.timeout_s)
        made = assemble(
            recipe,
            folder,
            identity.at_start(None, folder),
            meshes,
            device,
            RunData(of_kind, {}, []),
            counters,
            Signals(),
            make_saving_coordinator(recipe.checkpoint.timeout_s),
            resumed=None,
        )
        run = stack.enter_context(made)
        run.network.apply_stage(stage, num_groups=1)
        ready = map(
            Preparer(stage.seq_len, meshes, device, loader.sources), loader.batches(stage.micro_batch, stage.seq_len)
        )
        counters, turns = counters.enter_stage(name, {}), Turns(run, line)
        line.send(run.recorder.slots)
        turns.wait()
        while True:
            first = counters.stage_samples
            counters = run_step(run, counters, range(first, first + rows), ready)
            turns.halt(after_step=True)


@contextmanager
def working(recipe: Recipe, level: str, folder: Path) -> Iterator[Connection]:
    """The line to a process that does the work."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=work, args=(recipe, level, folder, theirs))
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def pieces(line: Connection) -> Iterator[float]:
    """The seconds that each piece of a step takes; a piece is made when it is asked for."""
    after_step = False
    while not after_step:
        line.send("go")
        seconds, after_step = line.recv()
        yield seconds


Times = dict[str, list[list[float]]]
"""Seconds of each piece of each step, by level."""


def one_round(recipe: Recipe, pairs: int) -> tuple[Times, int]:
    """Times in new processes, and the values a step."""
    taken: Times = {"off": [], "full": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        lines = {level: stack.enter_context(working(recipe, level, Path(folder) / level)) for level in taken}
        slots = {level: line.recv() for level, line in lines.items()}
        for pair in range(WARM_UP + pairs):
            order = list(lines) if pair % 2 else list(lines)[::-1]
            by_piece = list(zip(*(pieces(lines[level]) for level in order), strict=True))
            if pair >= WARM_UP:
                for level, step in zip(order, zip(*by_piece, strict=True), strict=True):
                    taken[level].append(list(step))
    return taken, slots["full"]


def ratios(taken: Times) -> list[float]:
    """Full ÷ off of each pair."""
    return [sum(full) / sum(off) for full, off in zip(taken["full"], taken["off"], strict=True)]


def show(title: str, rounds: list[Times]) -> float:
    """Print the table. Returns the median ratio."""
    taken = {level: [step for of_round in rounds for step in of_round[level]] for level in rounds[0]}
    steps = {level: [sum(step) for step in of_level] for level, of_level in taken.items()}
    fastest = {level: sum(map(min, zip(*of_level, strict=True))) for level, of_level in taken.items()}
    low, middle, high = quantiles(ratios(taken), n=4)
    of_rounds = ", ".join(f"{median(ratios(of_round)):.4f}" for of_round in rounds)
    table = Table(title=title, caption=f"medians of rounds: {of_rounds}")
    for column in ("off (s)", "full (s)", "ratio (median)", "quartiles", "of the fastest"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{median(steps['off']):.3f}",
        f"{median(steps['full']):.3f}",
        f"{middle:.4f}",
        f"{low:.4f} to {high:.4f}",
        f"{fastest['full'] / fastest['off']:.4f}",
    )
    Console().print(table)
    return middle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=4, help="of a round")
    parser.add_argument("--recipe", default="step3p5_mini")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    recipe = resolve(args.recipe, args.overrides)
    rounds, slots = zip(*(one_round(recipe, args.pairs) for _ in range(args.rounds)), strict=True)
    title = f"{args.recipe}: {slots[0]:,} values a step, {args.rounds} rounds of {args.pairs} pairs"
    ratio = show(title, list(rounds))
    met = ratio <= GOAL
    print(f"goals: {int(met)} of 1 met (full ÷ off at most {GOAL})")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
