"""A run that sends its plane to a server, which is killed and started again in the middle: training goes on, nothing is lost."""

import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from faulty_runs import faulty_recipe, run
from plane_server import Server
from small_runs import column, metrics

from steptron.config.monitoring import ServerConfig
from steptron.config.schema import Recipe
from steptron.monitor import store
from steptron.train.watch import Watch

STEPS = 100


def _train(recipe: Recipe) -> None:
    """Train; what handing over each step's numbers took of training's thread, in seconds, is in handed.json."""
    torch.set_num_threads(1)
    hand_over, seconds = Watch.step, []

    def timed(*args: Any) -> None:
        start = time.perf_counter()
        hand_over(*args)
        seconds.append(time.perf_counter() - start)

    with patch.object(Watch, "step", timed):
        run(recipe, None, None, None)
    (Path(recipe.run.dir) / "handed.json").write_text(json.dumps(seconds))


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
        dead = len(metrics(folder)) + 1
        _wait_for(folder, 45)
        dead = slice(dead, len(metrics(folder)))
        server = Server(tmp_path / "store", port=int(server.address.rpartition(":")[2]))
        training.join(120)
        assert training.exitcode == 0
        assert server.stop() == 0
    finally:
        training.kill()
        server.process.kill()
    assert column(folder, "step") == list(range(1, STEPS + 1))
    handed = json.loads((folder / "handed.json").read_text())
    alone, served = handed[dead], handed[: dead.start - 1] + handed[dead.stop + 1 :]
    assert len(alone) > 10
    assert median(alone) < 1.5 * median(served) + 1e-3, "handing over takes no longer without a server"
    assert max(alone) < 1.0, "and not once as long as trying to reach one"
    with store.connect(server.plane("tiny")) as tables:
        stored = tables.sql("SELECT step, loss FROM run ORDER BY step").fetchall()
        experts = tables.sql("SELECT step, sum(tokens) FROM layer_expert GROUP BY step ORDER BY step").fetchall()
    wanted = torch.tensor(column(folder, "loss"), dtype=torch.float32).tolist()
    assert stored == list(zip(range(1, STEPS + 1), wanted, strict=True))
    assert experts == [(step, 2 * 2 * 512) for step in range(1, STEPS + 1)], (
        "two layers, two experts a token, none twice"
    )
