"""A disk that is full for some steps of a real run, and has room again: training continues, and no step is missing
afterwards."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faulty_runs import run
from steptron.config.schema import CheckpointConfig, Recipe
from steptron.parallel.network import Network

from ranks import start
from small_disks import fill, needs_root, small_disk
from small_runs import column
from tiny import tiny_recipe

STEPS = 40
FULL, ROOM = 4, 36
"""Steps before which the disk is filled, and has room again; there is no checkpoint in between."""


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 20_000) as disk:
        yield disk


def _train(recipe: Recipe, disk: Path) -> None:
    torch.set_num_threads(1)
    seen = []

    def act(network: Network, step: int) -> None:
        if step == FULL:
            fill(disk)
        if step == ROOM:
            seen.extend(column(disk / "run", "step"))
            (disk / "filler").unlink()

    run(recipe, act, None, None)
    (disk / "seen").write_text(" ".join(map(str, seen)))


@needs_root
def test_training_goes_on_over_a_full_disk_and_no_step_is_missing(corpus, disk):
    recipe = tiny_recipe(corpus, disk / "run", checkpoint=CheckpointConfig(every=1000))
    stage = replace(recipe.stages["base"], tokens=STEPS * 4 * 32)
    recipe = replace(recipe, stages={"base": stage})
    training = start(_train, recipe, disk)
    training.join()
    assert training.exitcode == 0
    seen = [int(step) for step in (disk / "seen").read_text().split()]
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) < ROOM // 2, "metrics had stopped, training had not"
    assert column(disk / "run", "step") == list(range(1, STEPS + 1))
    log = (disk / "run" / "logs" / "rank-00000.log").read_text()
    assert log.count("metrics.jsonl is written again, and complete") == 1
    assert "the metrics plane stopped: [Errno 28] No space left on device; training continues without it" in log
