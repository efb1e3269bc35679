"""Weights of targets in a run: what is refused and named, and what has nothing to learn from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from steptron.config.schema import CheckpointConfig
from steptron.data.loader import Batch, Loader, Sample
from steptron.errors import DataError
from steptron.train.engines.native import NativeEngine

from small_runs import ledger, metrics, steptron, write_recipe
from tiny import tiny_recipe


def train(corpus: Path, folder: Path, change: Callable[[int, Sample], Sample], monkeypatch, code: int) -> str:
    """Run the tiny recipe, whose samples of stage `base` are changed, and return its standard error."""
    draw = Loader._sample

    def changed(self: Loader, stage: str, index: int) -> Sample:
        sample = draw(self, stage, index)
        return change(index, sample) if stage == "base" else sample

    monkeypatch.setattr(Loader, "_sample", changed)
    tiny = tiny_recipe(corpus, folder / "run", checkpoint=CheckpointConfig(every=1, keep=9))
    stages = {name: replace(stage, tokens=stage.tokens // 2) for name, stage in tiny.stages.items()}
    recipe = write_recipe(replace(tiny, stages=stages), folder / "recipe.yaml")
    return steptron("train", recipe, code=code).stderr


def with_weights(sample: Sample, first: float, others: float = 1.0) -> Sample:
    weights_S = np.full(len(sample.tokens_S), others, dtype=np.float32)
    weights_S[0] = first
    return sample._replace(weights_S=weights_S)


def of_source(source: str, weight: float) -> Sample:
    tokens_S = np.arange(6)
    return with_weights(Sample(tokens_S, np.zeros(6, dtype=np.int32), np.ones(6, dtype=np.float32), source), weight)


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_none_is_named_with_stage_and_source(weight: float):
    samples = [of_source("prose", 1.0), of_source("code", weight)]
    with pytest.raises(DataError, match=rf"^data\.sources\.code: .*stage base has weight {weight};") as raised:
        Batch.from_samples("base", samples)
    assert "\n" not in str(raised.value)


def test_weights_come_into_the_rows():
    rows = Batch.from_samples("base", [of_source("prose", 0.0), of_source("code", 2.5)]).rows
    assert rows.weights_BS.tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0, 1.0], [2.5, 1.0, 1.0, 1.0, 1.0, 1.0]]


def test_a_run_with_a_negative_weight_ends_with_the_user_s_error(corpus, tmp_path, monkeypatch):
    error = train(corpus, tmp_path, lambda n, s: with_weights(s, -1.0) if n == 9 else s, monkeypatch, code=2)
    lines = [line for line in error.splitlines() if "weight -1.0" in line]
    assert len(lines) == 1, "printed once"
    assert "stage base" in lines[0]
    assert "data.sources." in lines[0]
    assert len(metrics(tmp_path / "run")) == 2, "the third step would have read sample 9"


def test_a_batch_without_a_target_ends_the_run_before_its_update(corpus, tmp_path, monkeypatch):
    masked, updates = range(8, 12), []  # the samples of the third step
    update = NativeEngine.update
    monkeypatch.setattr(NativeEngine, "update", lambda *args: (updates.append(1), update(*args)))
    error = train(corpus, tmp_path, lambda n, s: with_weights(s, 0.0, 0.0) if n in masked else s, monkeypatch, code=2)
    lines = [line for line in error.splitlines() if "all weights of the batch are 0" in line]
    assert len(lines) == 1, "printed once"
    assert "step 3: " in lines[0]
    assert "(stage base, sources code, prose)" in lines[0]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert len(updates) == 2
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == ["step-00000001", "step-00000002"]
    assert ledger(tmp_path / "run")[-1]["exit_code"] == 2


def test_an_mtp_head_without_a_target_adds_nothing(corpus, tmp_path, monkeypatch):
    def pairs(_: int, sample: Sample) -> Sample:
        return sample._replace(documents_S=np.arange(len(sample.tokens_S), dtype=np.int32) // 2)

    train(corpus, tmp_path, pairs, monkeypatch, code=0)
    lines = [line for line in metrics(tmp_path / "run") if line["stage"] == "base"]
    assert len(lines) == 5
    for line in lines:
        assert line["mtp_loss"] == 0.0
        assert line["total_loss"] == line["loss"] + line["balance_loss"]
        assert 0 < line["grad_norm"] < 100
