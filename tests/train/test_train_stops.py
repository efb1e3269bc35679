"""Runs that are told to stop, and go on: signals, `--or-resume`, `--step`, two at once."""

import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import column, command, ledger, steptron, tiny_recipe, write_recipe

from steptron.config.schema import CheckpointConfig

pytestmark = pytest.mark.takes(60)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> Path:
    """The folder of a run on one process that nobody stopped, with every checkpoint kept."""
    folder = tmp_path_factory.mktemp("stops")
    recipe = tiny_recipe(
        corpus, folder / "run", checkpoint=CheckpointConfig(every=4, keep=1, keep_every=8, keep_events=("stage_start",))
    )
    steptron("train", write_recipe(recipe, folder / "tiny.yaml"))
    return folder / "run"


def started(path: Path, *overrides: str, ranks: int = 1) -> subprocess.Popen[str]:
    words = command("train", path, *overrides, ranks=ranks)
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def reach(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    written = run / "metrics.jsonl"
    while not written.exists() or written.read_text().count("\n") < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_signals_save_and_leave_with_75(undisturbed, corpus, tmp_path):
    """One run, told to stop three times in three ways, has the losses of one that nobody stopped."""
    run = tmp_path / "run"
    path = write_recipe(tiny_recipe(corpus, run, checkpoint=CheckpointConfig(every=1000)), tmp_path / "tiny.yaml")
    for goal, name in ((3, "SIGTERM"), (8, "SIGUSR1"), (13, "SIGINT")):
        process = started(path, "--or-resume")
        reach(run, goal, process)
        process.send_signal(getattr(signal, name))
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 75, said
        stopped = int(checkpoints(run)[-1].removeprefix("step-"))
        assert column(run, "step") == list(range(1, stopped + 1))
        assert f"stopped: {name}: saved at step {stopped}; go on with `steptron resume {run}`\n" in said
        assert said.count(name) == 2, "once when it came, once at the end"
        assert ledger(run)[-1]["event"] == "run_end"
    steptron("train", path, "--or-resume")
    assert column(run, "loss") == column(undisturbed, "loss")
    steptron("train", path, "--or-resume")
    assert column(run, "loss") == column(undisturbed, "loss"), "a run at its end is left as it is"


def test_one_of_two_ranks_gets_the_signal(corpus, tmp_path):
    run = tmp_path / "run"
    path = write_recipe(tiny_recipe(corpus, run, checkpoint=CheckpointConfig(every=1000)), tmp_path / "tiny.yaml")
    process = started(path, ranks=2)
    reach(run, 3, process)
    ranks = subprocess.run(
        ["pgrep", "-f", "--", f"-m steptron train {path}"], capture_output=True, text=True
    ).stdout.split()
    last = max(int(pid) for pid in ranks if int(pid) != process.pid)
    subprocess.run(["kill", "-USR1", str(last)], check=True)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert said.count("stopped: SIGUSR1: saved at step") == 1
    assert len(checkpoints(run)) == 1


def test_a_step_by_number(undisturbed, tmp_path):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", undisturbed, run], check=True)
    assert checkpoints(run) == ["step-00000008", "step-00000010", "step-00000016", "step-00000020"]
    refused = steptron("resume", run, "--step", 12, code=2)
    assert refused.stderr.count("\n") == 1
    assert "nearest: 8, 10, 16" in refused.stderr
    steptron("resume", run, "--step", 8)
    assert [line["checkpoint"] for line in ledger(run) if line["event"] == "resume"] == ["step-00000008"]
    assert column(run, "loss") == column(undisturbed, "loss")
    assert column(run, "step") == list(range(1, 21))
    assert "abandoned-step-00000016" in checkpoints(run)


def test_two_at_once_are_refused(corpus, tmp_path):
    run = tmp_path / "run"
    path = write_recipe(tiny_recipe(corpus, run), tmp_path / "tiny.yaml")
    process = started(path, "stages.base.tokens=1M")
    reach(run, 2, process)
    refused = steptron("resume", run, code=2)
    assert refused.stderr.count("\n") == 1
    assert f"is being trained by process {process.pid} on host" in refused.stderr
    process.kill()
    process.communicate()
    steptron("resume", run, "stages.base.tokens=1280")
    steps = column(run, "step")
    assert steps == list(range(1, len(steps) + 1))
    assert ledger(run)[-1]["event"] == "run_end"


def test_a_copy_replaces_what_is_damaged_here(undisturbed, corpus, tmp_path):
    run, place = tmp_path / "run", tmp_path / "place"
    recipe = tiny_recipe(corpus, run)
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, copy_to=str(place)))
    path = write_recipe(recipe, tmp_path / "tiny.yaml")
    process = started(path, "stages.long.tokens=1M")
    reach(run, 14, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    newest = run / "checkpoints" / checkpoints(run)[-1]
    assert sorted(p.name for p in (place / "tiny").iterdir()) == checkpoints(run)
    refused = steptron("train", path, f"run.dir={tmp_path / 'other'}", code=2)
    assert refused.stderr.count("\n") == 1
    assert f"checkpoint.copy_to={place}: {place / 'tiny'} holds another run's checkpoints, up to step" in refused.stderr
    assert not (tmp_path / "other" / "recipe.yaml").exists()
    (newest / "__0_0.distcp").write_bytes(b"")
    done = steptron("resume", run, "stages.long.tokens=2560")
    assert f"{newest.name} was brought back from {place / 'tiny'}" in (run / "ledger.jsonl").read_text()
    resumed = [line for line in ledger(run) if line["event"] == "resume"]
    assert resumed[-1]["checkpoint"] == newest.name
    assert "Traceback" not in done.stderr
    assert column(run, "loss")[:10] == column(undisturbed, "loss")[:10]
