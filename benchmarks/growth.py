"""Measure what grows with a run: a synthetic run folder of 100,000 steps beside one of 100, read by resume, query, page
and report.

    python benchmarks/growth.py [--steps 100000] [--flush-every 50] [--keep FOLDER]

Both folders are written by the program's own writers, file merging included: metrics.jsonl, a ledger with a checkpoint
every 500 steps, and the plane with every statistic of a small network. Then the time is taken, the best of three, of

- a resume's look at the run folder: the ledger's lines, and metrics.jsonl and the plane cut at the last checkpoint
  (nothing is later);
- a query for the newest steps of a table by layer and expert;
- the live page's first data;
- the report.

Goals, all of them ratios in one run. A resume's look takes at most a twentieth of what a resume takes to import its
modules. A query takes at most twice the time of the short run. The page takes at most three times what `json.loads`
takes for the lines of metrics.jsonl, which it has to read; the report at most ten times, since it also draws a fixed
number of samples of every statistic. A table has at most 8 · ⌈log₈(flushes + 1)⌉ files.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from steptron.monitor.dashboard.documents import Dashboard
from steptron.monitor.dashboard.live import BUDGET_S
from steptron.monitor.dashboard.query import query_folder
from steptron.monitor.dashboard.report import write_report
from steptron.monitor.sinks.metrics_jsonl import JsonlSink
from steptron.monitor.sinks.plane import PlaneSink
from steptron.monitor.statistics.frame import Frame
from steptron.monitor.statistics.plane import Surface, full_registry
from steptron.monitor.storage import jsonl, ledger
from steptron.monitor.storage.files import Folder
from steptron.train.rewind import rewinds_in_ledger, windows_in_ledger

SHORT = 100
"""Steps of the short run."""
OF_START, OF_SHORT, PAGE, REPORT = 0.05, 2.0, 3.0, 10.0
"""Goals: resume ÷ imports, query ÷ the short run's, page and report ÷ `json.loads`."""
LAYERS, EXPERTS = 4, 8
PLANES = 64
"""Different planes that the steps take turns with."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Seconds that each look takes, and files a table."""

    steps: int
    resume: float
    query: float
    page: float
    report: float
    parsing: float
    start: float
    files: int


def registry():
    """Every statistic of a small network, on one rank."""
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "router", "gate", "up", "down")
    return full_registry(
        Surface(
            moe_layers=range(1, LAYERS),
            num_experts=EXPERTS,
            world_size=1,
            layers_here=range(LAYERS),
            moe_layers_here=range(1, LAYERS),
            experts_here=range(EXPERTS),
            num_heads=4,
            parameters=[f"layers.{layer}.{part}.weight" for layer in range(LAYERS) for part in parts],
            sources=("prose", "code"),
            positions=(0, 128),
            num_mtp_heads=1,
            modules=(),
        )
    )


def make_run(run_dir: Path, steps: int, flush_every: int) -> None:
    """Write a run folder."""
    run_dir.mkdir(parents=True)
    statistics, random = registry(), np.random.default_rng(0)
    planes = random.uniform(1, 2, (PLANES, statistics.slots)).astype(np.float32)
    scalars, plane = JsonlSink(run_dir), PlaneSink(run_dir / "metrics", statistics, flush_every)
    keys = (
        "loss",
        "mtp_loss",
        "balance_loss",
        "total_loss",
        "grad_norm",
        "lr",
        "step_time",
        "tokens_per_second",
        "mfu",
    )
    with (run_dir / ledger.FILE_NAME).open("w") as file:
        file.write(jsonl.dump({"time": "2026-01-01T00:00:00.000+00:00", "event": "run_start", "step": 0}))
        for step in range(1, steps + 1):
            values = dict(zip(keys, random.uniform(1, 2, len(keys)).tolist(), strict=True))
            metrics = {"step": step, "stage": "base" if step <= steps // 2 else "long", "tokens": step * 8192, **values}
            metrics |= {"seq_len": 4096, "batch_tokens": 8192}
            of_plane = planes[step % PLANES]
            scalars.write(Frame(step=step, metrics=metrics, tokens_by_source={"prose": 6000, "code": 2192}, plane=None))
            plane.write(Frame(step=step, metrics={}, tokens_by_source={}, plane=of_plane))
            if step % 500 == 0:
                event = {"time": "2026-01-01T00:00:00.000+00:00", "event": "checkpoint", "step": step, "seconds": 1.0}
                file.write(jsonl.dump(event))
    scalars.close()
    plane.close()


def resume(run_dir: Path, steps: int) -> None:
    """Look at the folder as a resume does."""
    ledger.read(run_dir, "resume")
    ledger.read(run_dir, "checkpoint")
    windows_in_ledger(run_dir)
    rewinds_in_ledger(run_dir)
    for sink in (JsonlSink(run_dir), PlaneSink(run_dir / "metrics", registry(), 50)):
        sink.truncate_after(steps)
        sink.close()


def page(run_dir: Path) -> None:
    """Give the live page what it asks for first."""
    run = Dashboard(run_dir)
    run.refresh(BUDGET_S)
    for name in run.tags():
        run.document(name)


def parse(run_dir: Path) -> None:
    """Read metrics.jsonl, and do nothing with it."""
    for line in (run_dir / "metrics.jsonl").open("rb"):
        json.loads(line)


def fastest(act: Callable[[], object]) -> float:
    """Seconds, of three times."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        act()
        taken.append(time.perf_counter() - start)
    return min(taken)


def start_up() -> None:
    """Import what a resume imports, in a new process."""
    subprocess.run([sys.executable, "-c", "import steptron.train.start"], check=True)


def look(run_dir: Path, steps: int) -> Seen:
    """Take all the times."""
    sql = f"SELECT layer, expert, max(activation_rms) FROM layer_expert WHERE step > {steps - 50} GROUP BY ALL"
    counts = {}
    for file in Folder.at(run_dir / "metrics").listed():
        counts[file.table] = counts.get(file.table, 0) + 1
    return Seen(
        steps=steps,
        resume=fastest(lambda: resume(run_dir, steps)),
        query=fastest(lambda: query_folder(str(run_dir), sql)),
        page=fastest(lambda: page(run_dir)),
        report=fastest(lambda: write_report(run_dir)),
        parsing=fastest(lambda: parse(run_dir)),
        start=fastest(start_up),
        files=max(counts.values()),
    )


def show(short: Seen, long: Seen, bound: int) -> list[bool]:
    """Print the table. Returns which goals are met."""
    table = Table(title=f"{long.steps:,} steps beside {short.steps:,}")
    for column in ("look", f"{short.steps:,} steps (s)", f"{long.steps:,} steps (s)", "ratio", "goal"):
        table.add_column(column, justify="left" if column == "look" else "right")
    met = []
    for name, goal, one, other, beside in (
        ("resume: ledger, metrics.jsonl, plane ÷ imports", OF_START, short.resume, long.resume, long.start),
        ("query of the newest steps ÷ the short run's", OF_SHORT, short.query, long.query, short.query),
        ("page: first data ÷ json.loads", PAGE, short.page, long.page, long.parsing),
        ("report ÷ json.loads", REPORT, short.report, long.report, long.parsing),
    ):
        met.append(other / beside <= goal)
        table.add_row(name, f"{one:.3f}", f"{other:.3f}", f"{other / beside:.3f}", f"{goal:g}")
    met.append(long.files <= bound)
    table.add_row("json.loads of metrics.jsonl", f"{short.parsing:.3f}", f"{long.parsing:.3f}", "", "")
    table.add_row("imports of a resume", f"{short.start:.3f}", f"{long.start:.3f}", "", "")
    table.add_row("files of a table, at most", str(short.files), str(long.files), "", str(bound))
    Console().print(table)
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--flush-every", type=int, default=50)
    parser.add_argument("--keep", type=Path, help="a folder that the long run is left in")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = []
        for steps in (SHORT, args.steps):
            run_dir = Path(folder) / f"run-{steps}"
            start = time.perf_counter()
            make_run(run_dir, steps, args.flush_every)
            print(f"{steps:,} steps are written in {time.perf_counter() - start:.0f} s", flush=True)
            seen.append(look(run_dir, steps))
        if args.keep:
            shutil.copytree(run_dir, args.keep, dirs_exist_ok=True)
    flushes = math.ceil(args.steps / args.flush_every)
    met = show(*seen, bound=8 * math.ceil(math.log(flushes + 1, 8)))
    print(f"goals: {sum(met)} of {len(met)} met")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
