"""W&B through its own library, offline; the file is read back with W&B's own reader."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_run import make_recipe, make_steps

from steptron.config.monitoring import WandbConfig
from steptron.monitor.collector import Collector
from steptron.monitor.sinks.wandb import load_summary

LAYERS = list(range(1, 9))


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """A home without W&B's files, and a server that nobody listens at."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_DIR", "WANDB_SILENT"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(home))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def _run_dir(tmp_path: Path) -> Path:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    return run_dir


def _collect(run_dir: Path, mode: str, steps: slice = slice(None), resumed: int | None = None) -> list:
    recipe = make_recipe(run_dir, 20, wandb=WandbConfig(mode=mode, project="proj"))  # pyright: ignore
    rows = list(make_steps(recipe))
    with Collector(recipe, run_dir, LAYERS, 16, resumed=resumed) as collector:
        for row in rows[steps]:
            collector.step(*row)
    return rows


def _records(run_dir: Path) -> list[list[dict]]:
    """Records of each offline run, in W&B's order of time."""
    wandb = Path(sys.executable).parent / "wandb"
    result = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime):
        text = subprocess.run([wandb, "leet", "inspect", "--json", path], capture_output=True, text=True, check=True)
        result.append([json.loads(line) for line in text.stdout.splitlines()])
    return result


def _history(records: list[dict]) -> list[dict]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def test_the_offline_file_holds_every_value_and_step(tmp_path, capfd):
    run_dir = _run_dir(tmp_path)
    rows = _collect(run_dir, "offline")
    assert capfd.readouterr() == ("", ""), "W&B is silent"
    (records,) = _records(run_dir)
    history = _history(records)
    assert [item["train/step"] for item in history] == [metrics["step"] for metrics, _, _ in rows]
    assert [item["_step"] for item in history] == [metrics["step"] for metrics, _, _ in rows]
    for item, (metrics, counts_LE, sources) in zip(history, rows, strict=True):
        for name, value in metrics.items():
            section = "data" if name in ("seq_len", "batch_tokens") else "train"
            assert item[f"{section}/{name}"] == value
        for source, tokens in sources.items():
            assert item[f"data/tokens/{source}"] == tokens
        for layer, counts_E in zip(LAYERS, counts_LE, strict=True):
            assert item[f"experts/idle/layer_{layer:02d}"] == np.count_nonzero(counts_E == 0)
            expected = counts_E.max() / counts_E.mean()
            assert item[f"experts/max_over_mean/layer_{layer:02d}"] == pytest.approx(expected, rel=1e-6)
    assert records[-1]["type"] == "exit"
    run = next(record["run"] for record in records if record["type"] == "run")
    assert (run["display_name"], run["project"]) == ("run", "proj")
    assert run["config"]["update"]["model"]["moe"]["num_experts"] == 16
    assert run["config"]["update"]["stages"]["base"]["seq_len"] == 512


def test_a_resumed_run_goes_on_in_the_same_run(tmp_path):
    run_dir = _run_dir(tmp_path)
    _collect(run_dir, "offline", slice(0, 10))
    _collect(run_dir, "offline", slice(6, 14), resumed=6)
    first, second = _records(run_dir)
    ids = [
        next(record["run"]["run_id"] for record in records if record["type"] == "run") for records in (first, second)
    ]
    assert ids[0] == ids[1] == (run_dir / "wandb" / "run-id").read_text().strip()
    assert [item["train/step"] for item in _history(first)] == list(range(1, 11))
    assert [item["train/step"] for item in _history(second)] == list(range(7, 15))


def test_disabled_writes_and_imports_nothing(tmp_path):
    run_dir = _run_dir(tmp_path)
    code = (
        "import sys; from pathlib import Path; from fake_run import *; from steptron.monitor.collector import Collector\n"
        f"run_dir = Path({str(run_dir)!r}); Collector(make_recipe(run_dir), run_dir, [1], 16).close()\n"
        "print('wandb' in sys.modules, (run_dir / 'wandb').exists())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    assert done.stdout.split() == ["False", "False"]


def test_online_without_an_account_logs_offline_and_asks_nobody(tmp_path, caplog):
    run_dir = _run_dir(tmp_path)
    with caplog.at_level(logging.WARNING, "steptron"):
        _collect(run_dir, "online", slice(0, 3))
    (record,) = caplog.records
    assert "wandb login" in record.getMessage()
    (records,) = _records(run_dir)
    assert len(_history(records)) == 3


@pytest.mark.parametrize("point", ["init", "log"])
def test_a_failure_of_wandb_is_one_warning(tmp_path, monkeypatch, caplog, point):
    import wandb

    class Broken:
        step = 0

        def define_metric(self, *_, **__): ...

        def log(self, *_, **__):
            raise wandb.Error("the service has gone\nat length")

    def init(**_):
        if point == "init":
            raise wandb.Error("no server\nat length")
        return Broken()

    monkeypatch.setattr(wandb, "init", init)
    run_dir = _run_dir(tmp_path)
    with caplog.at_level(logging.WARNING, "steptron"):
        _collect(run_dir, "offline")
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert "the run goes on without it" in record.getMessage()
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 20


def test_load_summary_by_hand():
    tokens_LE = np.array([[4, 4, 4, 4], [0, 2, 4, 10]], dtype=np.float32)
    assert load_summary(tokens_LE, [3, 11]) == {
        "experts/max_over_mean": 2.5,
        "experts/min_over_mean": 0.0,
        "experts/idle": 1.0,
        "experts/max_over_mean/layer_03": 1.0,
        "experts/max_over_mean/layer_11": 2.5,
        "experts/idle/layer_03": 0,
        "experts/idle/layer_11": 1,
    }
