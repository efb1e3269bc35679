"""Short waits of a person or a step, each as a ratio to a reference of the same kind in the same run.

    python benchmarks/latency.py [--rounds 9]

    --help              a new process of `steptron --help`, beside one of Python that imports argparse alone
    detectors           one step's judgement of 45 layers of 288 experts and 64 ranks, quiet and with an alarm in
                        every layer, beside medians over experts of three statistics of every layer
    hand-over           what a step's numbers hold training up, with a metrics server that has stopped answering and
                        with none, beside one that answers
    published model     building it on the meta device, and one rank's stage of it among 4,096, beside importing torch

Contestants take turns, so that what else the machine does meets all alike. What is printed is each one's median and the
median of its ratios to the reference's turn.
"""

import argparse
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from steptron.config.detectors import DetectorsConfig
from steptron.config.monitoring import ServerConfig
from steptron.monitor.detect import Detectors, Surroundings
from steptron.monitor.statistics.reduced_stats import register_vitals
from steptron.monitor.statistics.registry import Registry

Times = dict[str, list[float]]
"""Seconds of each contestant's turns; the first one is the reference."""

PATIENCE_S = 600.0
"""Seconds that a metrics server may take to confirm what it has received; a deadline that only ends a hang."""
GOALS = {
    "steptron --help": 3.0,
    "judging a quiet step": 8.0,
    "judging a step in trouble": 20.0,
    "hand-over, the server has stopped": 1.5,
    "hand-over, no server": 1.5,
    "building the model": 1.0,
    "building a stage of 4,096 ranks": 1.0,
}
"""Most that each may be, in times of its reference."""

LAYERS, EXPERTS, RANKS = tuple(range(3, 48)), 288, 64


def in_turn(rounds: int, contestants: dict[str, Callable[[], float]]) -> Times:
    """Let each take `rounds` turns, in changing order, and return the seconds that each says it took."""
    names, taken = list(contestants), {name: [] for name in contestants}
    for number in range(rounds):
        for name in names if number % 2 else names[::-1]:
            taken[name].append(contestants[name]())
    return taken


def timed(act: Callable[[], object], now: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that a call takes, by the clock `now`."""
    start = now()
    act()
    return now() - start


# ── --help ──


def measure_help(rounds: int) -> Times:
    """Time whole processes."""

    def process(*words: str) -> Callable[[], float]:
        return lambda: timed(lambda: subprocess.run([sys.executable, *words], check=True, capture_output=True))

    return in_turn(
        3 * rounds,
        {
            "Python and argparse": process("-c", "import argparse"),
            "steptron --help": process("-m", "steptron", "--help"),
        },
    )


# ── detectors ──


def planes(registry: Registry, troubled: bool) -> list[np.ndarray]:
    """Return vital planes of 15 steps: loads and norms of tokens dealt at random; in trouble, one expert of each
    layer explodes."""
    random, found = np.random.default_rng(0), []
    for step in range(15):
        plane = registry.new_plane()
        for name, statistic in registry.statistics.items():
            registry.view(plane, name)[...] = random.uniform(0.9, 1.1, statistic.shape)
        rows_LE = random.poisson(32, (len(LAYERS), EXPERTS)) + 1.0
        for name, factor in {"tokens": 1, "rows": 1, "elements": 64, "out_norm_sum": 1, "h_square_sum": 64}.items():
            registry.view(plane, name)[...] = factor * rows_LE
        registry.view(plane, "not_finite")[...] = 0
        if troubled:
            registry.view(plane, "out_norm_sum")[:, step % EXPERTS] *= 100
            registry.view(plane, "tokens")[:, 5] = 0
        found.append(plane)
    return found


def measure_detectors(rounds: int) -> Times:
    """Time 30 steps a turn, in CPU time; a turn's time is its median step."""
    around = Surroundings(layers=LAYERS, num_experts=EXPERTS, top_k=8, ep=8, world_size=RANKS, level="light")
    registry = Registry()
    register_vitals(registry, LAYERS, EXPERTS, RANKS)

    def judge(troubled: bool) -> Callable[[], float]:
        detectors, steps, made = (
            Detectors(DetectorsConfig(), around),
            iter(range(401, 10**9)),
            planes(registry, troubled),
        )

        def one() -> float:
            step = next(steps)
            return timed(lambda: detectors.observe(step, "base", registry, made[step % 15]), time.thread_time)

        return lambda: statistics.median(one() for _ in range(30))

    quiet = planes(registry, False)[0]

    def medians() -> None:
        for name in ("out_norm_sum", "h_square_sum", "weight_square_sum"):
            np.median(registry.view(quiet, name), axis=1)

    return in_turn(
        rounds,
        {
            "medians over experts": lambda: statistics.median(timed(medians, time.thread_time) for _ in range(30)),
            "judging a quiet step": judge(False),
            "judging a step in trouble": judge(True),
        },
    )


# ── hand-over ──


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """Run a metrics server that soon confirms what it has received. Yields its process and address."""
    words = "-m steptron monitor serve --bind 127.0.0.1:0 --receivers 1 --flush 1 --store".split()
    process = subprocess.Popen(
        [sys.executable, *words, str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().split(",")[0].rpartition("/")[2]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measure_hand_over(rounds: int) -> Times:
    """Time one step a turn, of 3,840 values, on three collectors in this process."""
    import torch

    from steptron.monitor.sinks.collector import Collector
    from steptron.monitor.sinks.server import ServerSink
    from steptron.monitor.statistics.host_copy import HostCopies

    registry = Registry()
    for number in range(4):
        registry.add(f"statistic_{number}", unit="1", reduction="sum", axes={"layer": range(15), "expert": range(64)})
    values = torch.ones(registry.slots)
    with (
        tempfile.TemporaryDirectory() as name,
        serving(Path(name) / "a") as (_, answers),
        serving(Path(name) / "b") as (other, stops),
    ):
        addresses = {
            "hand-over, the server answers": answers,
            "hand-over, the server has stopped": stops,
            "hand-over, no server": "127.0.0.1:1",
        }
        acts: dict[str, Callable[[], float]] = {}
        sinks: dict[str, ServerSink] = {}
        for number, (title, address) in enumerate(addresses.items()):
            folder = Path(name) / f"run{number}"
            sinks[title] = sink = ServerSink(
                folder,
                ServerConfig(addresses=(address,)),
                f"run{number}",
                registry,
                uid=f"{number:016x}",
                attempt=1,
            )
            collector, outbox = Collector({"server": lambda sink=sink: sink}), HostCopies(registry.slots, values.device)
            steps = iter(range(1, 10**9))

            def hand_over(collector=collector, outbox=outbox, steps=steps) -> float:
                seconds = timed(lambda: collector.step({"step": next(steps)}, {}, outbox.send(values)))
                time.sleep(1e-3)  # a step
                return seconds

            acts[title] = hand_over
        in_turn(20, acts)
        backlog, deadline = sinks["hand-over, the server has stopped"]._backlog, time.monotonic() + PATIENCE_S
        while len(backlog):  # until the server has the connection, and has confirmed all that came
            if time.monotonic() > deadline:
                raise TimeoutError(f"the metrics server confirmed nothing within {PATIENCE_S:.0f} s")
            time.sleep(0.01)
        os.killpg(other.pid, signal.SIGSTOP)
        return in_turn(40 * rounds, acts)


# ── the published model ──

BUILD = """
import json, time
start = time.perf_counter()
import torch
imported = time.perf_counter()
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from steptron.config.resolve import resolve
from steptron.model.transformer import Transformer
from steptron.parallel.apply import distribute
from steptron.parallel.mesh import build_meshes, resolve_layout
from steptron.parallel.pipeline_split import cut

recipe, world = resolve("step3p5_flash"), 4096
ready = time.perf_counter()
with torch.device("meta"):
    Transformer(recipe.model)
built = time.perf_counter()
layout = resolve_layout(recipe.parallel, world)
part = cut(recipe, recipe.parallel.pp)[0]
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
with torch.device("meta"):
    model = Transformer(recipe.model, part)
distribute(model, recipe, build_meshes(layout, "cpu"))
end = time.perf_counter()
print(json.dumps([imported - start, built - ready, end - built]))
"""


def measure_model(rounds: int) -> Times:
    """Time all three in each of some new processes."""

    taken: Times = {"importing torch": [], "building the model": [], "building a stage of 4,096 ranks": []}
    for _ in range(max(1, rounds // 3)):
        done = subprocess.run([sys.executable, "-c", BUILD], check=True, capture_output=True, text=True)
        for name, seconds in zip(taken, json.loads(done.stdout.splitlines()[-1]), strict=True):
            taken[name].append(seconds)
    return taken


MEASURES = (measure_help, measure_detectors, measure_hand_over, measure_model)


def main() -> int:
    """Print the table and the goals met; 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    table, met = Table(title=f"{args.rounds} rounds; medians"), []
    for column in ("", "ms", "÷ reference", "at most"):
        table.add_column(column, justify="right" if column else "left")
    for measure in MEASURES:
        taken = measure(args.rounds)
        reference = next(iter(taken.values()))
        for name, seconds in taken.items():
            ratio = statistics.median(one / other for one, other in zip(seconds, reference, strict=True))
            goal = GOALS.get(name)
            table.add_row(
                name, f"{statistics.median(seconds) * 1e3:,.2f}", f"{ratio:.2f}", "" if goal is None else f"{goal:g}"
            )
            if goal is not None:
                met.append(ratio <= goal)
    Console().print(table)
    print(f"goals: {sum(met)} of {len(met)} met")
    return 0 if all(met) else 1


if __name__ == "__main__":
    logging.getLogger("steptron").setLevel(logging.ERROR)  # servers that are away are what is measured
    sys.exit(main())
