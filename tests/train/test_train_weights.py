"""Weights of targets in a run: what is refused and named, and what has nothing to learn from."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from steptron.config.schema import CheckpointConfig
from steptron.data.loader import check_weights
from steptron.errors import DataError
from steptron.train.engines.native import NativeEngine
from steptron.train.run import open_loader

from changed_samples import Drawn, changed_samples
from small_runs import ledger, metrics, steptron, write_recipe
from tiny import tiny_recipe


def train(corpus: Path, folder: Path, change: Callable[[Drawn], np.ndarray | None], code: int) -> str:
    """Run the tiny recipe, whose samples of stage `base` are changed, and return its standard error."""
    tiny = tiny_recipe(corpus, folder / "run", checkpoint=CheckpointConfig(every=1, keep=9))
    stages = {name: replace(stage, tokens=stage.tokens // 2) for name, stage in tiny.stages.items()}
    recipe = write_recipe(replace(tiny, stages=stages), folder / "recipe.yaml")
    with changed_samples(lambda sample: change(sample) if sample.stage == "base" else None):
        return steptron("train", recipe, code=code).stderr


def weigh(samples: Collection[int], first: float, others: float) -> Callable[[Drawn], None]:
    """Return a change that gives these samples a weight for the first token and one for the others."""

    def change(sample: Drawn) -> None:
        if sample.index in samples:
            sample.weights_S[:1], sample.weights_S[1:] = first, others

    return change


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_none_is_named_with_stage_and_source(weight: float):
    weights_BS = np.ones((3, 6), dtype=np.float32)
    check_weights(weights_BS, "base", ("prose", "code", "prose"))
    weights_BS[1, 4] = weight
    with pytest.raises(DataError, match=rf"^data\.sources\.code: .*stage base has weight {weight};") as raised:
        check_weights(weights_BS, "base", ("prose", "code", "prose"))
    assert "\n" not in str(raised.value)


def test_weights_come_into_the_rows(corpus: Path, tmp_path: Path):
    loader = open_loader(tiny_recipe(corpus, tmp_path / "run"))
    assert loader.batch("base", range(3)).rows.weights_BS.unique().tolist() == [1.0]
    with changed_samples(weigh([1], 2.5, 0.5)):
        weights = open_loader(tiny_recipe(corpus, tmp_path / "run")).batch("base", range(3)).rows.weights_BS.tolist()
    others = len(weights[0]) - 1
    assert weights == [[1.0] * (1 + others), [2.5, *[0.5] * others], [1.0] * (1 + others)]


def test_a_run_with_a_negative_weight_ends_with_the_user_s_error(corpus, tmp_path):
    error = train(corpus, tmp_path, weigh([9], -1.0, 1.0), code=2)
    lines = [line for line in error.splitlines() if "weight -1.0" in line]
    assert len(lines) == 1, "printed once"
    assert "stage base" in lines[0]
    assert "data.sources." in lines[0]
    assert len(metrics(tmp_path / "run")) == 2, "the third step would have read sample 9"


def test_a_batch_without_a_target_ends_the_run_before_its_update(corpus, tmp_path, monkeypatch):
    masked, updates = range(8, 12), []  # the samples of the third step
    update = NativeEngine.update
    monkeypatch.setattr(NativeEngine, "update", lambda *args: (updates.append(1), update(*args)))
    error = train(corpus, tmp_path, weigh(masked, 0.0, 0.0), code=2)
    lines = [line for line in error.splitlines() if "all weights of the batch are 0" in line]
    assert len(lines) == 1, "printed once"
    assert "step 3: " in lines[0]
    assert "(stage base, sources code, prose)" in lines[0]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert len(updates) == 2
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == ["step-00000001", "step-00000002"]
    assert ledger(tmp_path / "run")[-1]["exit_code"] == 2


def test_an_mtp_head_without_a_target_adds_nothing(corpus, tmp_path):
    def pairs(sample: Drawn) -> np.ndarray:
        size = len(sample.tokens_S)
        return np.array([2] * (size // 2) + [1] * (size % 2))

    train(corpus, tmp_path, pairs, code=0)
    lines = [line for line in metrics(tmp_path / "run") if line["stage"] == "base"]
    assert len(lines) == 5
    for line in lines:
        assert line["mtp_loss"] == 0.0
        assert line["total_loss"] == line["loss"] + line["balance_loss"]
        assert 0 < line["grad_norm"] < 100
