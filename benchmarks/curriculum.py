"""The curriculum 4,096 → 32,768 → 131,072 for real: `pretrain/curriculum_128k` on two processes of this machine.

    python benchmarks/curriculum.py [--run FOLDER] [--ranks 2] [key=value …]

    build the data, if they are missing ─► train all stages under the launcher ─► table by stage
    one sliding and one full attention layer, forward and backward, at each length ─► time per token

The training loss of a stage is the mean over the first and over the last third of its steps. At 131,072 tokens a step
is one sequence of one source, so it also shows which source that was; the held-out loss, at the first and the last
evaluation of the stage, reads the same text each time. The peak of memory is that of each rank in the stage, as the
run's ledger has it. The lengths of a layer are timed in turns, each three times, on one thread.
The time of the run is that from the first line of its ledger to the last.

Goals: at most 30 minutes and 16 GiB for all ranks together; at least two steps at 131,072; a lower held-out loss
at the end of each stage; a sliding layer needs at most 1.5 times the time per token at 131,072 that it needs at 4,096.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from steptron.config.resolve import resolve
from steptron.config.schema import AttentionConfig, Recipe
from steptron.monitor.storage import ledger
from steptron.nn.attention import Attention
from steptron.nn.packing import Packing
from steptron.nn.rope import rope_frequencies, rope_tables

RECIPE = "curriculum_128k"
MINUTES, GIB, STEPS, GROWTH = 30.0, 16.0, 2, 1.5
"""The goals: time, memory, steps at the longest length, time per token of a sliding layer."""
LENGTHS = (4_096, 16_384, 32_768, 131_072)
ROUNDS = 3


def train(recipe: Recipe, folder: Path, ranks: int, overrides: list[str]) -> None:
    """Build the data if they are missing, and train the recipe."""
    if not Path(recipe.data.tokenizer).exists():
        build = recipe.data.build_command.split()
        subprocess.run([sys.executable, "-m", *build], check=True)
    launcher = ["steptron.launcher.torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m", "steptron"]
    subprocess.run(
        [sys.executable, "-m", *launcher, "train", RECIPE, f"run.dir={folder.absolute()}", *overrides], check=True
    )


def show_stages(recipe: Recipe, folder: Path, console: Console) -> bool:
    """Print the table of the stages. Return whether the goals of the run are met."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = ledger.read(folder)
    ends = {line["stage"]: line for line in events if line["event"] == "stage_end"}
    began, ended = (datetime.fromisoformat(events[n]["time"]) for n in (0, -1))
    minutes = (ended - began).total_seconds() / 60
    table = Table(title=f"{RECIPE}: {minutes:.1f} minutes")
    columns = (
        "stage",
        "length",
        "steps",
        "tokens",
        "training loss",
        "held-out loss",
        "seconds a step",
        "peak GiB of each rank",
    )
    for column in columns:
        table.add_column(column)
    met = minutes <= MINUTES
    for name, stage in recipe.stages.items():
        mine = [step for step in steps if step["stage"] == name]
        third = max(1, len(mine) // 3)
        first, last = (statistics.fmean(step["loss"] for step in part) for part in (mine[:third], mine[-third:]))
        held_out = [step["eval/loss"] for step in mine if "eval/loss" in step]
        peaks = ends[name]["peak_memory_gib"]
        table.add_row(
            name,
            f"{stage.seq_len:,}",
            str(len(mine)),
            f"{sum(step['batch_tokens'] for step in mine):,}",
            f"{first:.3f} → {last:.3f}",
            f"{held_out[0]:.3f} → {held_out[-1]:.3f}",
            f"{statistics.median(step['step_time'] for step in mine):.1f}",
            ", ".join(f"{peak:.2f}" for peak in peaks),
        )
        met &= held_out[-1] < held_out[0] and sum(peaks) <= GIB and (stage.seq_len < max(LENGTHS) or len(mine) >= STEPS)
    console.print(table)
    return met


def time_layer(recipe: Recipe, config: AttentionConfig, length: int) -> float:
    """Return the seconds of an attention layer, forward and backward, on one document of that length."""
    model = recipe.model
    layer = Attention(model.hidden_size, model.head_dim, config, model.norm_eps)
    packing = Packing.from_documents(torch.zeros(1, length, dtype=torch.int64))
    frequencies_R = rope_frequencies(model.head_dim, config.rotary_share, 1e4, None)
    rope = rope_tables(packing.positions_BT.flatten(), frequencies_R)
    x_BTD = torch.randn(1, length, model.hidden_size, requires_grad=True)
    start = time.perf_counter()
    output: Tensor = layer(x_BTD, packing, rope)
    output.sum().backward()
    return time.perf_counter() - start


def show_layers(recipe: Recipe, console: Console) -> bool:
    """Print the time per token of both kinds of layers by length. Return whether the sliding one is linear."""
    torch.set_num_threads(1)
    kinds = {"sliding": recipe.model.sliding, "full": recipe.model.full}
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for name, config in kinds.items():
            for length in LENGTHS:
                if name == "sliding" or length <= LENGTHS[-2]:  # a full layer at the last length would take minutes
                    seconds.setdefault((name, length), []).append(time_layer(recipe, config, length))
    per_token = {key: statistics.median(found) / key[1] * 1e6 for key, found in seconds.items()}
    table = Table(title="microseconds per token of a layer, forward and backward, median (lowest to highest)")
    for column in ("length", *kinds):
        table.add_column(column, justify="right")
    for length in LENGTHS:
        cells = []
        for name in kinds:
            found = [each / length * 1e6 for each in seconds.get((name, length), [])]
            cells.append(f"{statistics.median(found):.1f} ({min(found):.1f} to {max(found):.1f})" if found else "–")
        table.add_row(f"{length:,}", *cells)
    console.print(table)
    growth = per_token["sliding", LENGTHS[-1]] / per_token["sliding", LENGTHS[0]]
    console.print(f"sliding, {LENGTHS[-1]:,} beside {LENGTHS[0]:,}: {growth:.2f} times per token (goal {GROWTH})")
    return growth <= GROWTH


def main() -> int:
    """Run the benchmark. Return the exit code: 0 if the goals are met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the run folder; one that has the finished run is only read")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    recipe, console = resolve(RECIPE, args.overrides), Console(width=140)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.run or Path(temporary) / "run"
        if not (folder / "metrics.jsonl").exists():
            train(recipe, folder, args.ranks, args.overrides)
        met = show_stages(recipe, folder, console)
    met &= show_layers(recipe, console)
    console.print("all goals met" if met else "a goal is missed")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
