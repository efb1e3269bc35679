"""Six million values a step from 16 ranks to one metrics server on this machine, beside wandb, TensorBoard and SQLite.

    python benchmarks/monitor.py [--steps N] [--receivers N]

Each simulated rank has a plane of 375,000 values (40 statistics of 15 layers × 625 experts, no cell of them another
rank's), hands it over as training does (`HostCopies.send`, `Collector.step`), and continues when at most six of its
steps are on their way. The server stores every value as Parquet; at the end a few are asked for in SQL. 16 ranks are
two processes of 8, so that what is theirs alone (one interpreter, one core) is shared by eight: hand-over times are
upper bounds.

    held up      from the plane on the device until training goes on
    server CPU   user and system time of all its processes, from /proc
    memory       proportional set size of all its processes, shared frames counted once: around a quarter of the
                 steps (50 of 200), and in the last tenth
    values/s     from the first hand-over until the server has confirmed the last step as on disk; for the others,
                 until their files are closed
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from steptron.config.monitoring import ServerConfig
from steptron.monitor.statistics.registry import Registry

RANKS, SENDERS = 16, 2
PIPELINE, EXPERT_PARALLEL = 4, 4
LAYERS, EXPERTS, STATISTICS = 60, 2500, 40
VALUES = LAYERS * EXPERTS * STATISTICS
KINDS = 4
"""Different planes a rank has; steps take turns, so that no two in a file are alike."""
ON_THEIR_WAY = 6
RUN = "bench"

SLICES = {"wandb offline": (20, 10_000), "TensorBoard": (4, 10_000), "SQLite": (10, 60_000)}
"""Steps, and values of each, that the others get: as many as they can in some seconds."""

GOAL_HELD_MS, GOAL_CPU_S, GOAL_GROWTH = 2.0, 0.25, 0.05
GOAL_RATIOS = {"wandb offline": 100, "TensorBoard": 100, "SQLite": 30}


class Usage(NamedTuple):
    """Of the server, at one moment."""

    cpu_s: float
    memory_mib: float


class Outcome(NamedTuple):
    """Of the server's part."""

    seconds: float
    cpu_s_per_step: float
    held_ms: list[float]
    early_mib: float
    late_mib: float
    wrong: int


def main() -> int:
    """Print the table and the goals met; 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of 6,000,000 values (default: 200)")
    parser.add_argument("--receivers", type=int, default=1, help="receiver processes of the server (default: 1)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        others = {name: measure(Path(folder)) for name, measure in OTHERS.items()}
        outcome = measure_server(Path(folder), args.steps, args.receivers)
    ours = args.steps * VALUES / outcome.seconds
    table = Table(title=f"{VALUES:,} values a step from {RANKS} ranks, {args.steps} steps, {os.cpu_count()} cores")
    for column in ("", "measured", "goal", "met"):
        table.add_column(column, justify="left" if column == "" else "right")
    goals: list[bool] = []

    def row(name: str, measured: str, goal: str = "", met: bool | None = None) -> None:
        table.add_row(name, measured, goal, "" if met is None else "yes" if met else "no")
        if met is not None:
            goals.append(met)

    held, p99 = statistics.median(outcome.held_ms), float(np.quantile(outcome.held_ms, 0.99))
    growth = outcome.late_mib / outcome.early_mib - 1
    row("server: values/s, end to end", f"{ours / 1e6:,.1f} M")
    for name, rate in others.items():
        goal = GOAL_RATIOS[name]
        steps, names = SLICES[name]
        row(f"{name}: values/s, {names:,} of the same values, {steps} steps", f"{rate / 1e6:,.3f} M")
        row(f"server ÷ {name}", f"{ours / rate:,.0f} ×", f"≥ {goal} ×", ours >= goal * rate)
    row(
        "a rank's step is held up, median (p99)",
        f"{held:.2f} ms ({p99:.2f})",
        f"≤ {GOAL_HELD_MS:g} ms",
        held <= GOAL_HELD_MS,
    )
    cpu = outcome.cpu_s_per_step
    row("server CPU a step", f"{cpu:.3f} s", f"≤ {GOAL_CPU_S:g} s", cpu <= GOAL_CPU_S)
    memory = f"{outcome.early_mib:,.0f} → {outcome.late_mib:,.0f} MiB"
    row("server memory early and late", f"{memory} ({growth:+.1%})", f"≤ +{GOAL_GROWTH:.0%}", growth <= GOAL_GROWTH)
    row("values read back in SQL that are wrong", str(outcome.wrong), "0", outcome.wrong == 0)
    Console(width=110).print(table)
    print(f"goals: {sum(goals)} of {len(goals)} met")
    return 0 if all(goals) else 1


# ── the server ──


def rank_registry(rank: int) -> Registry:
    """40 statistics of a rank's layers and experts."""
    stage, part = divmod(rank, EXPERT_PARALLEL)
    layers, experts = LAYERS // PIPELINE, EXPERTS // EXPERT_PARALLEL
    axes = {
        "layer": range(stage * layers, (stage + 1) * layers),
        "expert": range(part * experts, (part + 1) * experts),
    }
    registry = Registry()
    for number in range(STATISTICS):
        registry.add(f"statistic_{number:02d}", unit="1", reduction="max" if number % 4 == 0 else "sum", axes=axes)
    return registry


def rank_plane(rank: int, kind: int) -> np.ndarray:
    """Norms and the like: positive, over two orders of magnitude, every bit of the mantissa used."""
    random = np.random.default_rng(KINDS * rank + kind)
    return random.lognormal(0.0, 1.0, VALUES // RANKS).astype(np.float32)


def measure_server(folder: Path, steps: int, receivers: int) -> Outcome:
    """All ranks through one server."""
    with serving(folder / "runs", receivers) as (process, port):
        spawn = multiprocessing.get_context("spawn")
        answers, progress = spawn.SimpleQueue(), spawn.Array("q", SENDERS)
        barrier = spawn.Barrier(SENDERS + 1)
        senders = [
            spawn.Process(target=_sender, args=(number, port, steps, str(folder), answers, progress, barrier))
            for number in range(SENDERS)
        ]
        for sender in senders:
            sender.start()
        barrier.wait()
        before, start = usage(process.pid), time.perf_counter()
        early = mean_memory(process.pid, senders, progress, 0.2 * steps, 0.3 * steps)
        late = mean_memory(process.pid, senders, progress, 0.9 * steps, steps)
        held = [time_ms for _ in senders for time_ms in answers.get()]
        seconds = time.perf_counter() - start
        after = usage(process.pid)
        for sender in senders:
            sender.join()
        wrong = wrong_values(port, steps)
    return Outcome(seconds, (after.cpu_s - before.cpu_s) / steps, held, early, late, wrong)


@contextlib.contextmanager
def serving(store: Path, receivers: int) -> Iterator[tuple[subprocess.Popen, int]]:
    """A server process and its port."""
    command = [sys.executable, "-m", "steptron", "monitor", "serve", "--bind", "127.0.0.1:0", "--store", str(store)]
    process = subprocess.Popen([*command, "--receivers", str(receivers)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r":(\d+), receivers", line)
        assert match, f"the server says {line!r}"
        yield process, int(match[1])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _sender(number: int, port: int, steps: int, folder: str, answers: Any, progress: Any, barrier: Any) -> None:
    """Eight ranks: steps as fast as the server takes them."""
    import torch

    from steptron.monitor.sinks.collector import Collector
    from steptron.monitor.sinks.server import ServerSink
    from steptron.monitor.statistics.host_copy import HostCopies

    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    config = ServerConfig(addresses=(f"127.0.0.1:{port}",))
    ranks = range(number, RANKS, SENDERS)
    sinks = {
        rank: ServerSink(
            Path(folder) / "ranks", config, RUN, rank_registry(rank), uid="0" * 16, attempt=1, rank=rank, writers=RANKS
        )
        for rank in ranks
    }
    collectors = {rank: Collector({"server": lambda sink=sink: sink}) for rank, sink in sinks.items()}
    device = torch.device("cpu")
    outboxes = {rank: HostCopies(VALUES // RANKS, device) for rank in ranks}
    planes = {rank: [torch.from_numpy(rank_plane(rank, kind)) for kind in range(KINDS)] for rank in ranks}
    held_ms = []
    barrier.wait()
    for step in range(1, steps + 1):
        for rank in ranks:
            while len(sinks[rank]._backlog) > ON_THEIR_WAY or outboxes[rank]._free.empty():
                time.sleep(1e-4)
            start = time.perf_counter()
            parcel = outboxes[rank].send(planes[rank][step % KINDS])
            collectors[rank].step({"step": step}, {}, parcel)
            held_ms.append((time.perf_counter() - start) * 1e3)
        progress[number] = step
    for collector in collectors.values():
        collector.close()
    assert not any(outbox.dropped for outbox in outboxes.values()), "a plane found no buffer"
    assert not any(len(sink._backlog) or sink.dropped for sink in sinks.values()), "a frame was not confirmed"
    answers.put(held_ms)


def mean_memory(pid: int, senders: list[Any], progress: Any, first: float, last: float) -> float:
    """The server's memory in MiB, on average while the ranks do the steps from `first` to `last`: a step is 24 MB
    more or less."""
    found = []
    while min(progress) < last or not found:
        assert not any(sender.exitcode for sender in senders), "a sender died"
        if min(progress) >= first:
            found.append(usage(pid).memory_mib)
        time.sleep(0.1)
    return statistics.mean(found)


def usage(pid: int) -> Usage:
    """CPU time and memory of a process and its children."""
    cpu_s = memory = 0.0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for one in [str(pid), *children]:
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        cpu_s += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
        memory += int(re.search(r"^Pss:\s+(\d+) kB", rollup, re.M)[1]) / 1024  # pyright: ignore[reportOptionalSubscript]
    return Usage(cpu_s, memory)


def wrong_values(port: int, steps: int) -> int:
    """Ask the server for values of every rank, and count what is missing or not what was sent."""
    import pyarrow.flight as flight

    random = np.random.default_rng(0)
    wrong = 0
    with flight.FlightClient(f"grpc://127.0.0.1:{port}") as client:
        for rank in range(RANKS):
            step = int(random.integers(1, steps + 1))
            registry, plane = rank_registry(rank), rank_plane(rank, step % KINDS)
            name = f"statistic_{int(random.integers(STATISTICS)):02d}"
            layer_axis, expert_axis = registry.statistics[name].grid
            layer, experts = int(layer_axis.values[3]), [int(value) for value in expert_axis.values]
            sql = (
                f"SELECT expert, {name} AS value FROM layer_expert "
                f"WHERE step = {step} AND layer = {layer} ORDER BY expert"
            )
            rows = client.do_get(flight.Ticket(json.dumps({"run": RUN, "sql": sql}).encode())).read_all()
            found = dict(zip(rows["expert"].to_pylist(), rows["value"].to_pylist(), strict=True))
            expected = registry.view(plane, name)[3].tolist()
            wrong += sum(found.get(expert) != value for expert, value in zip(experts, expected, strict=True))
    return wrong


# ── the others ──


def _few_values(name: str) -> tuple[list[str], np.ndarray]:
    """Names as a dashboard would have them, and values by step: the first of rank 0's planes, as the server gets
    them."""
    steps, names = SLICES[name]
    labels = [f"experts/layer_{n // 100:03d}/expert_{n % 100:03d}/norm" for n in range(names)]
    return labels, np.stack([rank_plane(0, step % KINDS)[:names] for step in range(1, steps + 1)])


def measure_wandb(folder: Path) -> float:
    """Values/s of `Run.log`, offline, until the run is finished."""
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    os.environ["WANDB_SILENT"] = "true"
    import wandb

    labels, values = _few_values("wandb offline")
    settings = wandb.Settings(silent=True, console="off")
    run = wandb.init(dir=str(folder), mode="offline", project="bench", settings=settings)
    start = time.perf_counter()
    for step, row in enumerate(values.tolist()):
        run.log(dict(zip(labels, row, strict=True)), step=step)
    run.finish()
    return values.size / (time.perf_counter() - start)


def measure_tensorboard(folder: Path) -> float:
    """Values/s of `SummaryWriter.add_scalar` until it is closed."""
    from torch.utils.tensorboard import SummaryWriter

    labels, values = _few_values("TensorBoard")
    writer = SummaryWriter(str(folder / "tensorboard"))
    start = time.perf_counter()
    for step, row in enumerate(values.tolist()):
        for label, value in zip(labels, row, strict=True):
            writer.add_scalar(label, value, step)
    writer.close()
    return values.size / (time.perf_counter() - start)


def measure_sqlite(folder: Path) -> float:
    """Values/s of one prepared insert a value, a transaction a step, until the last is committed."""
    _, values = _few_values("SQLite")
    connection = sqlite3.connect(folder / "bench.sqlite")
    connection.execute("CREATE TABLE plane (step INTEGER, layer INTEGER, expert INTEGER, value REAL)")
    start = time.perf_counter()
    for step, row in enumerate(values.tolist()):
        rows = [(step, cell // 1000, cell % 1000, value) for cell, value in enumerate(row)]
        with connection:
            connection.executemany("INSERT INTO plane VALUES (?, ?, ?, ?)", rows)
    seconds = time.perf_counter() - start
    connection.close()
    return values.size / seconds


OTHERS: dict[str, Callable[[Path], float]] = {
    "wandb offline": measure_wandb,
    "TensorBoard": measure_tensorboard,
    "SQLite": measure_sqlite,
}

if __name__ == "__main__":
    sys.exit(main())
