"""A metrics server in processes of its own, ranks to send to it, and what the store should hold then."""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from steptron.config.monitoring import ServerConfig
from steptron.monitor.sinks.server import ServerSink
from steptron.monitor.statistics.frame import Frame
from steptron.monitor.statistics.registry import Registry
from steptron.monitor.storage import store

from planes import steps_in
from waiting import PATIENCE_S

LAYERS, EXPERTS = [2, 5, 7], 4


class Server:
    """A `steptron monitor serve`; its store is `folder`."""

    def __init__(self, folder: Path, *options: str, port: int = 0, host: str = "127.0.0.1"):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "steptron",
            "monitor",
            "serve",
            "--bind",
            f"{host}:{port}",
            "--store",
            str(folder),
        ]
        command += ["--receivers", "1", "--flush", "0.2", "--timeout", str(PATIENCE_S), *options]
        with (folder / "stderr").open("ab") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.search(r":(\d+), receivers", line)
        assert match, f"the server says {line!r}, and {(folder / 'stderr').read_text()!r}"
        self.address = f"{host}:{match[1]}"

    def kill(self) -> None:
        """As a machine that loses power: all processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def journal(self) -> list[dict]:
        """Lines of server.jsonl."""
        path = self.folder / "server.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def refused(self) -> dict[str, int]:
        """Refusals by kind, as far as they were written."""
        return {line["kind"]: line["count"] for line in self.journal() if line["event"] == "refused"}

    def plane(self, run: str) -> Path:
        """Where a run's plane is."""
        return self.folder / run / "metrics"


@contextlib.contextmanager
def running(folder: Path, *options: str, **more) -> Iterator[Server]:
    """A server that is gone afterwards, whatever happens."""
    server = Server(folder, *options, **more)
    try:
        yield server
    finally:
        server.kill()


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def rank_registry(rank: int, layers=LAYERS) -> Registry:
    """Rank 0 has the vital statistics; experts are shared out by rank, layers are everybody's."""
    registry = Registry()
    if rank == 0:
        registry.add("loss", unit="nats", reduction="sum", axes={}, vital=True)
        registry.add(
            "tokens", unit="1", reduction="sum", axes={"layer": layers, "expert": range(2 * EXPERTS)}, vital=True
        )
    mine = range(rank % 2 * EXPERTS, (rank % 2 + 1) * EXPERTS)
    registry.add("square_sum", unit="1", reduction="sum", axes={"layer": layers, "expert": mine})
    registry.add("rows", unit="1", reduction="sum", axes={"layer": layers, "expert": mine})
    registry.derive("rms", unit="1", powers={"square_sum": 0.5, "rows": -0.5})
    registry.add("peak", unit="1", reduction="max", axes={"layer": layers})
    registry.add("norm", unit="1", reduction="sum", axes={"parameter": [f"own.{rank}", "shared"]})
    return registry


def rank_plane(rank: int, step: int, registry: Registry | None = None) -> np.ndarray:
    """What a rank sends in a step: whole numbers, so that sums are exact."""
    slots = (registry or rank_registry(rank)).slots
    return np.random.default_rng(1000 * step + rank).integers(1, 1000, slots).astype(np.float32)


def expected_cells(name: str, step: int, ranks) -> dict[tuple, float]:
    """A statistic of a step by cell, put together value by value."""
    reduce = {"sum": lambda a, b: a + b, "max": max}
    cells: dict[tuple, float] = {}
    for rank in ranks:
        registry = rank_registry(rank)
        if name in registry.statistics:
            statistic = registry.statistics[name]
            for index, value in np.ndenumerate(registry.view(rank_plane(rank, step), name)):
                cell = tuple(axis.values[i] for axis, i in zip(statistic.grid, index, strict=True))
                cells[cell] = reduce[statistic.reduction](cells[cell], float(value)) if cell in cells else float(value)
    return cells


def assert_stored(folder: Path, steps, ranks) -> None:
    """Every step is there once, put together from all ranks."""
    assert steps_in(folder) == {step: frozenset(ranks) for step in steps}
    connection = store.connect(folder)
    tables = {
        "run": ["loss"],
        "layer_expert": ["tokens", "square_sum", "rows"],
        "layer": ["peak"],
        "parameter": ["norm"],
    }
    for table, names in tables.items():
        axes = {"run": [], "parameter": ["parameter"]}.get(table, table.split("_"))
        rows = connection.execute(f"SELECT {', '.join(['step', *axes, *names])} FROM {table}").fetchall()
        for position, name in enumerate(names):
            column = 1 + len(axes) + position
            found = {(row[0], row[1 : 1 + len(axes)]): row[column] for row in rows if row[column] is not None}
            wanted = {
                (step, cell): value for step in steps for cell, value in expected_cells(name, step, ranks).items()
            }
            assert found == wanted, name


def make_sink(server: str | list[str], run_dir: Path, rank: int, writers: int = 2, **more) -> ServerSink:
    """A rank's sink; the run is called as its folder, and known by its path."""
    options = {"attempt": 1, "uid": uid_of(run_dir)} | more
    registry = options.pop("registry", None) or rank_registry(rank)
    config = {"addresses": (server,) if isinstance(server, str) else tuple(server)} | options.pop("config", {})
    return ServerSink(run_dir, ServerConfig(**config), run_dir.name, registry, rank=rank, writers=writers, **options)


def uid_of(run_dir: Path) -> str:
    """The uid of the run in that folder."""
    return hashlib.blake2b(str(run_dir).encode(), digest_size=8).hexdigest()


def frame(rank: int, step: int, registry: Registry | None = None) -> Frame:
    """A step of a rank."""
    return Frame(step=step, metrics={}, tokens_by_source={}, plane=rank_plane(rank, step, registry))
