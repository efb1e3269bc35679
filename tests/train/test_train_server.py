"""A run that sends its plane to a server, which stalls, is killed and is started again: training continues and nothing
is lost."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
from faulty_runs import faulty_recipe, run
from steptron.config.monitoring import ServerConfig
from steptron.config.schema import Recipe
from steptron.monitor.sinks import server
from steptron.monitor.storage import store
from steptron.parallel.network import Network

from plane_server import Server
from ranks import start
from small_runs import column, metrics
from waiting import PATIENCE_S, wait_until

STEPS, HELD = 100, 90


def _train(recipe: Recipe, server_is_back: Path) -> None:
    """Train; before the last steps, wait for the server that takes what was kept."""
    torch.set_num_threads(1)
    server.CLOSE_S = PATIENCE_S

    def hold(network: Network, step: int) -> None:
        if step == HELD:
            wait_until(server_is_back.exists, "the server")

    run(recipe, hold, None, None)


def test_training_continues_without_its_server_and_loses_no_step(corpus, tmp_path):
    metrics_server = Server(tmp_path / "store")
    folder = tmp_path / "run"
    recipe = faulty_recipe(corpus, folder, STEPS)
    config = replace(recipe.monitor, server=ServerConfig(addresses=(metrics_server.address,)))
    training = start(_train, replace(recipe, monitor=config), tmp_path / "back")

    def reach(step: int) -> None:
        written = folder / "metrics.jsonl"
        wait_until(
            lambda: not training.is_alive() or (written.exists() and len(metrics(folder)) >= step), f"step {step}"
        )
        assert training.is_alive(), f"training exited with {training.exitcode}"

    try:
        reach(20)
        os.killpg(metrics_server.process.pid, signal.SIGSTOP)  # it has the connections and answers nothing
        reach(45)
        metrics_server.kill()
        reach(70)
        metrics_server = Server(tmp_path / "store", port=int(metrics_server.address.rpartition(":")[2]))
        (tmp_path / "back").touch()
        training.join()
        assert training.exitcode == 0
        assert metrics_server.stop() == 0
    finally:
        training.kill()
        metrics_server.kill()
    assert column(folder, "step") == list(range(1, STEPS + 1))
    with store.connect(metrics_server.plane("tiny")) as tables:
        stored = tables.execute("SELECT step, loss FROM run ORDER BY step").fetchall()
        experts = tables.execute("SELECT step, sum(tokens) FROM layer_expert GROUP BY step ORDER BY step").fetchall()
    wanted = torch.tensor(column(folder, "loss"), dtype=torch.float32).tolist()
    assert stored == list(zip(range(1, STEPS + 1), wanted, strict=True))
    assert experts == [(step, 2 * 2 * 512) for step in range(1, STEPS + 1)], (
        "two layers, two experts a token, none twice"
    )
