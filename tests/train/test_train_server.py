"""A run that sends its plane to a server, which is killed and started again in the middle: training goes on, nothing is lost."""

import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import torch
from faulty_runs import faulty_recipe, run
from plane_server import Server
from small_runs import column, metrics

from steptron.config.monitoring import ServerConfig
from steptron.config.schema import Recipe
from steptron.monitor import store

STEPS = 100


def _train(recipe: Recipe) -> None:
    torch.set_num_threads(1)
    run(recipe, None, None, None)


def _wait_for(folder: Path, step: int) -> None:
    end = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < step:
        assert time.monotonic() < end, f"step {step} does not come"
        time.sleep(0.05)


def test_training_goes_on_without_its_server_and_loses_no_step(corpus, tmp_path):
    server = Server(tmp_path / "store")
    folder = tmp_path / "run"
    recipe = faulty_recipe(corpus, folder, STEPS)
    config = replace(recipe.monitor, server=ServerConfig(addresses=(server.address,)))
    training = multiprocessing.get_context("spawn").Process(target=_train, args=(replace(recipe, monitor=config),))
    training.start()
    try:
        _wait_for(folder, 20)
        server.kill()
        _wait_for(folder, 45)
        server = Server(tmp_path / "store", port=int(server.address.rpartition(":")[2]))
        training.join(120)
        assert training.exitcode == 0
        assert server.stop() == 0
    finally:
        training.kill()
        server.process.kill()
    assert column(folder, "step") == list(range(1, STEPS + 1))
    with store.connect(server.plane("tiny")) as tables:
        stored = tables.sql("SELECT step, loss FROM run ORDER BY step").fetchall()
        experts = tables.sql("SELECT step, sum(tokens) FROM layer_expert GROUP BY step ORDER BY step").fetchall()
    wanted = torch.tensor(column(folder, "loss"), dtype=torch.float32).tolist()
    assert stored == list(zip(range(1, STEPS + 1), wanted, strict=True))
    assert experts == [(step, 2 * 2 * 512) for step in range(1, STEPS + 1)], (
        "two layers, two experts a token, none twice"
    )
