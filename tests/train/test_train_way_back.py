"""What the error of a run that ended says of the way back: the checkpoint that it names is there, and its command
continues the run."""

from dataclasses import replace

import pytest
import torch
from steptron.config.detectors import ActsConfig, PolicyConfig
from steptron.train import loop

from hints import commands
from small_disks import fill, needs_root, small_disk
from small_runs import column, ledger, steptron, write_recipe
from tiny import tiny_recipe

EVERY = 4
"""Steps between the checkpoints of `tiny_recipe`."""


@pytest.fixture
def recipe(corpus, tmp_path):
    recipe = tiny_recipe(corpus, tmp_path / "a run")
    policy = PolicyConfig(actions=ActsConfig(not_finite="stop"))
    base = replace(recipe.stages["base"], tokens=8 * 4 * 32)
    return replace(recipe, stages={"base": base}, monitor=replace(recipe.monitor, policy=policy))


def break_at(monkeypatch, step: int, name: str) -> None:
    """Have a parameter that is not a number from that step of the process on."""
    true_step, steps = loop.train_step, iter(range(1, 100))

    def train_step(engine, *rest):
        if next(steps) == step:
            with torch.no_grad():
                dict(engine.network.named_parameters())[name].fill_(float("nan"))
        return true_step(engine, *rest)

    monkeypatch.setattr(loop, "train_step", train_step)


@pytest.mark.parametrize("name", ["layers.1.moe.router.weight", "lm_head.weight"], ids=["router", "policy"])
@pytest.mark.parametrize("step", [EVERY - 1, EVERY + 2], ids=["before the first checkpoint", "after it"])
def test_after_nan_the_run_goes_on_as_its_error_says(monkeypatch, recipe, tmp_path, name, step):
    path = write_recipe(recipe, tmp_path / "tiny.yaml")
    with monkeypatch.context() as broken:
        break_at(broken, step, name)
        err = steptron("train", path, code=3).stderr
    assert err.splitlines()[-1].startswith(f"error: step {step}: ")
    assert err.count("error:") == 1
    said = "begins at its first step" if step < EVERY else f"continues from step-{EVERY:08d}, the newest"
    assert said in err
    steptron(*commands(err)[-1][1:])
    resumed = [line for line in ledger(tmp_path / "a run") if line["event"] == "resume"]
    assert [line["checkpoint"] for line in resumed] == [None if step < EVERY else f"step-{EVERY:08d}"]
    assert column(tmp_path / "a run", "step") == list(range(1, 9))


@needs_root
def test_where_the_first_checkpoint_finds_no_room_none_is_named(monkeypatch, recipe, tmp_path):
    with small_disk(tmp_path / "disk", 4_000) as disk:
        recipe = replace(recipe, run=replace(recipe.run, dir=str(disk / "run")))
        monkeypatch.setattr(loop, "_save", lambda *_, save=loop._save: (fill(disk), save(*_))[1])
        err = steptron("train", write_recipe(recipe, tmp_path / "tiny.yaml"), code=1).stderr
        monkeypatch.undo()
        assert "No space left on device; free some space" in err
        assert "the run has no complete checkpoint yet" in err
        (disk / "filler").unlink()
        (disk / "run" / "checkpoints").mkdir(exist_ok=True)
        assert [path.name for path in (disk / "run").rglob("*.tmp")] == []
