"""From a step's numbers to the sinks that the recipe asks for."""

import json
import logging
import time

import duckdb
import numpy as np
import pytest
from fake_run import make_recipe, make_steps

from steptron.monitor.collector import Collector
from steptron.monitor.sinks.jsonl import JsonlSink
from steptron.monitor.sinks.parquet import ParquetSink

LAYERS = list(range(1, 9))


def _tokens_by_step(run_dir) -> list[tuple]:
    return duckdb.sql(f"SELECT step, sum(tokens) FROM '{run_dir}/metrics/*.parquet' GROUP BY 1 ORDER BY 1").fetchall()


def _steps_in(run_dir) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("level", "layers", "plane"),
    [("off", LAYERS, False), ("light", LAYERS, True), ("full", LAYERS, True), ("light", [], False)],
    ids=["off", "light", "full", "no MoE layers"],
)
def test_level_and_model_choose_what_is_written(tmp_path, level, layers, plane):
    recipe = make_recipe(tmp_path, 10, level=level)
    with Collector(recipe, tmp_path, layers, 16) as collector:
        for metrics, counts_LE, sources in make_steps(recipe):
            collector.step(metrics, counts_LE if layers else None, sources)
    assert _steps_in(tmp_path) == list(range(1, 11))
    assert (tmp_path / "metrics").exists() == plane
    if plane:
        assert [step for step, _ in _tokens_by_step(tmp_path)] == list(range(1, 11))


def test_resume_leaves_no_trace_of_the_steps_done_again(tmp_path):
    """A run that was killed after step 17 and goes on from a checkpoint at 12 writes what an undisturbed one does."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    recipe = make_recipe(tmp_path, 30, flush_every=5)
    steps = list(make_steps(recipe))
    with Collector(recipe, tmp_path / "whole", LAYERS, 16) as collector:
        for step in steps:
            collector.step(*step)
    collector = Collector(recipe, tmp_path / "killed", LAYERS, 16)
    for number, step in enumerate(steps[:17], start=1):
        collector.step(*step)
        if number == 12:
            collector.flush()
    del collector  # as SIGKILL does: nothing is flushed or closed
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 18, "stage": "lo')
    with Collector(recipe, tmp_path / "killed", LAYERS, 16, resumed=12) as collector:
        for step in steps[12:]:
            collector.step(*step)
    whole, killed = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed"))
    assert killed == whole
    assert _tokens_by_step(tmp_path / "killed") == _tokens_by_step(tmp_path / "whole")


@pytest.mark.parametrize("broken", [JsonlSink, ParquetSink], ids=["metrics.jsonl", "parquet"])
def test_a_full_disk_stops_one_sink_and_not_the_run(tmp_path, monkeypatch, caplog, broken):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, "write", refuse)
    recipe = make_recipe(tmp_path, 10)
    with caplog.at_level(logging.WARNING), Collector(recipe, tmp_path, LAYERS, 16) as collector:
        for step in make_steps(recipe):
            collector.step(*step)
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    if broken is JsonlSink:
        assert len(_tokens_by_step(tmp_path)) == 10
    else:
        assert len(_steps_in(tmp_path)) == 10


def test_a_step_costs_little(tmp_path):
    """42 layers of 288 experts; CPU time, so that a busy machine does not count."""
    recipe = make_recipe(tmp_path, 60)
    counts_LE = np.random.default_rng(0).integers(0, 4000, (42, 288))
    steps = list(make_steps(recipe, num_layers=1))
    times = []
    with Collector(recipe, tmp_path, list(range(3, 45)), 288) as collector:
        for metrics, _, sources in steps:
            start = time.process_time()
            collector.step(metrics, counts_LE, sources)
            times.append(time.process_time() - start)
    assert sorted(times)[len(times) // 2] < 2e-3
