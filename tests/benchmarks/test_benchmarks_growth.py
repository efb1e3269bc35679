"""The short form of what `make bench-monitor` shows of long runs: bounded files and the right rows, and no word of
seconds."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from steptron.config.monitoring import MonitorConfig, WandbConfig
from steptron.config.schema import CheckpointConfig
from steptron.monitor.storage.files import Folder

from small_runs import build_corpus, steptron, write_recipe
from tiny import tiny_recipe

STEPS = 10


def _script(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _files_of_a_table(run_dir: Path) -> int:
    """The most that any table has, those that do not count among them."""
    listed = Folder.at(run_dir / "metrics").listed()
    return max(sum(file.table == table for file in listed) for table in {file.table for file in listed})


def test_a_made_up_run_has_few_files_and_every_look_at_it_works(tmp_path, monkeypatch):
    growth = _script("growth")
    monkeypatch.setattr(growth, "fastest", lambda act: float(act() is not act))
    growth.make_run(tmp_path / "run", 100, 3)
    seen = growth.look(tmp_path / "run", 100)
    assert seen.files == _files_of_a_table(tmp_path / "run") <= 7 * 3
    assert growth.show(seen, seen, bound=seen.files)[-1]
    assert not growth.show(seen, seen, bound=seen.files - 1)[-1]
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.takes(20)
def test_a_run_of_every_statistic_that_is_resumed_has_each_row_once_in_few_files(tmp_path):
    """A file a step; the resume from step 5 of 10 cuts rows that were merged with those before it."""
    long_run, run_dir = _script("long_run"), tmp_path / "run"
    monitor = MonitorConfig(level="full", flush_every=1, peak_tflops=0.1, wandb=WandbConfig(mode="disabled"))
    recipe = tiny_recipe(build_corpus(tmp_path), run_dir, monitor=monitor, checkpoint=CheckpointConfig(every=4, keep=3))
    stages = {name: replace(stage, tokens=stage.tokens // 2) for name, stage in recipe.stages.items()}
    recipe = replace(recipe, stages=stages)
    steptron("train", write_recipe(recipe, tmp_path / "recipe.yaml"))
    assert long_run.last_step(run_dir) == STEPS
    assert long_run.wrong_rows(run_dir, STEPS) == 0
    steptron("resume", run_dir, "--step", 5)
    assert long_run.wrong_rows(run_dir, STEPS) == 0
    assert 2 <= _files_of_a_table(run_dir) <= 7 * math.ceil(math.log(STEPS + 1, 8))
    assert long_run.wrong_rows(run_dir, STEPS + 1) == 1, "a step that is not there is found"


def test_memory_that_is_given_back_is_no_leak_and_memory_that_is_kept_is_one():
    """Merges of 20 MiB for a moment, one that holds 10 MiB until the next, and a step of 2 MiB at the beginning."""
    slope = _script("long_run").slope
    returned = [(n, 300 + 2 * (n > 200) + 20 * (n % 90 == 0) + 10 * (2500 < n < 3400)) for n in range(0, 5000, 10)]
    assert abs(slope(returned)) < 0.1
    assert math.isclose(slope([(n, mib + 0.006 * n) for n, mib in returned]), 6, rel_tol=0.1)
    assert math.isclose(slope([*returned, (5000, math.nan)]), slope(returned), abs_tol=0.1), (
        "the process has just ended"
    )
