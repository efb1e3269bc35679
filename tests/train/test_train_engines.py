"""Whole runs under DeepSpeed through the command line: the losses of native runs, and runs that go on under the other
engine."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from steptron.config.schema import CheckpointConfig, LrConfig, OptimConfig

from small_runs import column, ledger, steptron, write_recipe
from tiny import tiny_recipe

pytestmark = [
    pytest.mark.takes(50),
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed (pip install 'steptron[deepspeed]')",
    ),
]
COLUMNS = ("loss", "mtp_loss", "balance_loss", "total_loss", "grad_norm")
ZERO = ("engine=deepspeed", "deepspeed.zero=2")
STEPS, SAVED = 10, 7
"""Steps of a run, and those of the checkpoint before the last."""
WITHOUT_CLOCKS = ("monitor.policy.actions.straggler=ignore", "monitor.policy.actions.data_stall=ignore")
"""Other processes of this machine make a rank slow: what is decided is compared without it."""


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> dict[str, Path]:
    """Folders of a native run and of one under ZeRO 2, on two ranks, that nobody stopped."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = tiny_recipe(
        corpus,
        folder / "unused",
        data_ranks=2,
        optim=OptimConfig(matrix_optimizer="adamw"),
        checkpoint=CheckpointConfig(every=SAVED, keep=2),
    )
    stages = {name: replace(stage, tokens=stage.tokens // 2) for name, stage in recipe.stages.items()}
    stages["base"] = replace(stages["base"], lr=LrConfig(peak=3e-3))
    path = write_recipe(replace(recipe, stages=stages), folder / "tiny.yaml")
    for name, changes in {"native": (), "zero": ZERO}.items():
        done = steptron("train", path, *changes, *WITHOUT_CLOCKS, f"run.dir={folder / name}", ranks=2)
        assert "deepspeed" not in done.stdout.lower(), "its own lines do not get between ours"
    return {name: folder / name for name in ("native", "zero")}


def test_losses_are_native_ones(runs):
    for name in COLUMNS:
        assert column(runs["zero"], name) == pytest.approx(column(runs["native"], name), rel=1e-5, abs=1e-9), name
    assert column(runs["zero"], "act") == column(runs["native"], "act")


def test_one_process_needs_no_launcher(runs, tmp_path):
    steptron("train", runs["zero"] / "recipe.yaml", "deepspeed.zero=1", f"run.dir={tmp_path / 'alone'}")
    for name in COLUMNS:
        assert column(tmp_path / "alone", name) == pytest.approx(column(runs["native"], name), rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize(
    ("source", "changes", "exact"),
    [
        ("zero", (), True),
        ("native", ("engine=deepspeed", "deepspeed.zero=3"), False),
        pytest.param("zero", ("engine=native",), False, marks=pytest.mark.long),
    ],
    ids=["zero 2", "native to zero 3", "zero 2 to native"],
)
def test_a_run_goes_on(runs, tmp_path, source, changes, exact):
    """From the checkpoint before the last, under the engine that wrote it and under another."""
    run = tmp_path / "run"
    shutil.copytree(runs[source], run)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    steptron("resume", run, *changes, ranks=2)
    assert column(run, "step") == list(range(1, STEPS + 1))
    for name in COLUMNS:
        wanted = column(runs[source], name)
        assert column(run, name) == (wanted if exact else pytest.approx(wanted, rel=1e-5, abs=1e-9)), name
    resumed = [line for line in ledger(run) if line["event"] == "resume"]
    assert [line["checkpoint"] for line in resumed] == [f"step-{SAVED:08d}"]
    assert ("engine" in resumed[0]["changes"]) is not exact
