"""What W&B is told of a run on several ranks: the same as of a run on one, whatever part of it rank 0 holds."""

from dataclasses import replace
from pathlib import Path

import pytest
from steptron.config.monitoring import MonitorConfig, WandbConfig
from steptron.config.schema import CheckpointConfig, LrConfig

from small_runs import steptron, write_recipe
from tiny import tiny_recipe
from wandb_files import history, records

pytestmark = pytest.mark.takes(40)

STEPS = 4
LAYOUTS = {
    "pipeline stages": ["parallel.pp=2"],
    "shards and groups of experts": ["parallel.dense.dp_shard=2", "parallel.expert.ep=2"],
}


@pytest.fixture(scope="module")
def recipe(corpus):
    """Few steps, of which everything is watched."""
    lr = LrConfig(kind="cosine", peak=3e-3, end=1e-3)
    monitor = MonitorConfig(level="full", flush_every=4, peak_tflops=0.1, wandb=WandbConfig(mode="offline", worst=3))
    checkpoint = CheckpointConfig(every=1000)
    recipe = tiny_recipe(corpus, Path("run"), data_ranks=2, monitor=monitor, checkpoint=checkpoint)
    return replace(recipe, stages={"base": replace(recipe.stages["base"], tokens=STEPS * 4 * 32, lr=lr)})


def _train(recipe, folder, *overrides: str, ranks: int = 1) -> list[dict]:
    """W&B's rows of a new run: the numbers that do not depend on time or place."""
    steptron("train", write_recipe(recipe, folder / "tiny.yaml"), f"run.dir={folder / 'run'}", *overrides, ranks=ranks)
    (found,) = records(folder / "run")
    # Time, and what is estimated from a few matrices of those that a rank has.
    other = (
        "parameters/orthogonality",
        "train/step_time",
        "train/tokens_per_second",
        "train/mfu",
        "ranks/",
        "_runtime",
        "_timestamp",
        "_wandb",
    )
    rows = [{name: value for name, value in row.items() if not name.startswith(other)} for row in history(found)]
    return [{name: value for name, value in row.items() if not isinstance(value, str)} for row in rows]


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    return _train(recipe, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("overrides", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_wandb_is_told_the_same_of_two_ranks_as_of_one(recipe, alone, tmp_path, overrides):
    rows = _train(recipe, tmp_path, *overrides, ranks=2)
    assert len(rows) == len(alone) == STEPS
    for row, wanted in zip(rows, alone, strict=True):
        assert [name for name in wanted if name.startswith("parameters/gradient_norm/")]
        assert [name for name in wanted if name.startswith(("data/source_loss/", "train/mtp_loss/"))]
        assert {name for name in row if "/worst/" not in name} == {name for name in wanted if "/worst/" not in name}
        both = row.keys() & wanted.keys()
        assert len(both) > 0.9 * len(wanted), "among equals the worst may be others"
        for name in both:
            assert row[name] == pytest.approx(wanted[name], rel=2e-3, abs=1e-6), name
