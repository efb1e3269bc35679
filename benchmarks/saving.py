"""What a checkpoint costs training: the stall of a save in the background beside that of a save that is waited for.

    python benchmarks/saving.py [--rounds 5] [--recipe step3p5_mini] [--folder DIR] [key=value …]

One process holds the recipe's model with its optimizer (about 100 M parameters, fp32, in step3p5_mini). Each round, in
changing order: a save that training waits for; one in the background, of which training waits for the copy in host
memory only; and the same bytes written to a plain file, for the disk's own rate. While the background save is written,
training-like work (matrix products on the same cores) runs, and is compared with the same work without a save: what the
writer takes from it by sharing the machine.

Goal: the stall is at most 10 % of the time of the save that is waited for (medians).
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from steptron.checkpoint.retention import Retention
from steptron.checkpoint.saver import Saver
from steptron.config.resolve import resolve
from steptron.optim.optimizer import build_optimizer
from steptron.parallel.apply import build_network
from steptron.train.process_group import launched_layouts, make_coordinator, meshes_over, process_group

GOAL = 0.10
CHUNK = 1 << 26
"""Bytes of one write to the plain file."""


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def write_plain(path: Path, size: int) -> None:
    """Random bytes, on disk when it returns."""
    block = os.urandom(CHUNK)
    with path.open("wb") as file:
        for start in range(0, size, CHUNK):
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


class Work:
    """Some seconds of matrix products."""

    def __init__(self):
        self.a, self.times = torch.randn(1024, 1024), 60

    def __call__(self) -> None:
        for _ in range(self.times):
            torch.mm(self.a, self.a)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", default="step3p5_mini")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    recipe = resolve(args.recipe, args.overrides)
    taken: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        taken.setdefault(name, []).append(value)

    with (
        tempfile.TemporaryDirectory(dir=args.folder) as name,
        process_group(torch.device("cpu"), recipe.run.timeout_s),
    ):
        folder = Path(name)
        meshes = meshes_over(next(iter(launched_layouts(recipe).values())), torch.device("cpu"), recipe.run.timeout_s)
        network = build_network(recipe, meshes, torch.device("cpu"))
        optimizer = build_optimizer(dict(network.named_parameters()), recipe.optim)
        tensors = {**network.state(), **{f"optimizer.{key}": t for key, t in optimizer.state().items()}}
        size = sum(t.nbytes for t in tensors.values())
        savers = {
            kind: Saver(folder / kind, Retention(newest=1), make_coordinator(), None, background=kind == "background")
            for kind in ("waited for", "background")
        }
        work, step = Work(), 0
        work()

        def save(kind: str) -> None:
            savers[kind].save(step, lambda: tensors, before=lambda: None, counters={}, recipe_hash="", layout={})

        def beside() -> None:
            start = time.perf_counter()
            save("background")
            note("background", time.perf_counter() - start)
            note("work beside", seconds(work))
            savers["background"].wait()
            note("written", time.perf_counter() - start)

        acts: list[Callable[[], object]] = [
            lambda: note("waited for", seconds(lambda: save("waited for"))),
            beside,
            lambda: note("plain", seconds(lambda: write_plain(folder / "plain", size))),
            lambda: note("work", seconds(work)),
        ]
        for saver in savers.values():  # the first save also finds memory for its copy
            saver.save(0, lambda: tensors, before=lambda: None, counters={}, recipe_hash="", layout={})
            saver.wait()
        for number in range(args.rounds):
            step = number + 1
            for act in acts[number % 4 :] + acts[: number % 4]:
                act()
    table = Table(title=f"{args.recipe}: {size / 1e9:.2f} GB, {args.rounds} rounds; medians (least to most)")
    for column in ("", "seconds", "GB/s", "÷ waited for"):
        table.add_column(column, justify="left" if not column else "right")
    names = {
        "waited for": "save, waited for",
        "background": "save in the background: stall",
        "written": "the same, until it is written",
        "plain": "plain file of the same size",
    }
    waited = median(taken["waited for"])
    for key, name in names.items():
        middle = median(taken[key])
        spread = f"{middle:.3f} ({min(taken[key]):.3f} to {max(taken[key]):.3f})"
        table.add_row(name, spread, f"{size / middle / 1e9:.2f}", f"{middle / waited:.3f}")
    Console().print(table)
    print(f"work beside the writer ÷ work alone: {median(taken['work beside']) / median(taken['work']):.2f}")
    met = median(taken["background"]) <= GOAL * waited
    print(f"goals: {int(met)} of 1 met (stall ÷ save at most {GOAL})")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
