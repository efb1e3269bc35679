"""Runs that are told to stop, and go on: signals, `--or-resume`, `--step`, two at once."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from steptron.checkpoint.manifest import list_checkpoints, read_manifest, step_of, write_manifest
from steptron.checkpoint.remote import Remote
from steptron.config.changes import recipe_hash
from steptron.config.resolve import load_recipe
from steptron.config.schema import CheckpointConfig

from forks import Forked
from forks import run as run_fork
from small_runs import column, command, ledger, steptron, write_recipe
from tiny import tiny_recipe

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
    return Forked(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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
        said = process.communicate()[1]
        assert process.returncode == 75, said
        stopped = int(checkpoints(run)[-1].removeprefix("step-"))
        assert column(run, "step") == list(range(1, stopped + 1))
        assert f"stopped: {name}: saved at step {stopped}; continue with `steptron resume {run}`\n" in said
        assert said.count(name) == 2, "once when it came, once at the end"
        assert ledger(run)[-1]["event"] == "run_end"
    steptron("train", path, "--or-resume")
    assert column(run, "total_loss") == column(undisturbed, "total_loss")
    steptron("train", path, "--or-resume")
    assert column(run, "total_loss") == column(undisturbed, "total_loss"), "a run at its end is left as it is"


def test_one_of_two_ranks_gets_the_signal(corpus, tmp_path):
    run = tmp_path / "run"
    recipe = tiny_recipe(corpus, run, data_ranks=2, checkpoint=CheckpointConfig(every=1000))
    path = write_recipe(recipe, tmp_path / "tiny.yaml")
    process = started(path, ranks=2)
    reach(run, 3, process)
    ranks = subprocess.run(
        ["pgrep", "-f", "--", f"-m steptron train {path}"], capture_output=True, text=True
    ).stdout.split()
    last = max(int(pid) for pid in ranks if int(pid) != process.pid)
    subprocess.run(["kill", "-USR1", str(last)], check=True)
    said = process.communicate()[1]
    assert process.returncode == 75, said
    assert said.count("stopped: SIGUSR1: saved at step") == 1
    assert len(checkpoints(run)) == 1


def test_a_place_that_hangs_keeps_nobody_from_leaving(corpus, tmp_path):
    """Saves continue, and a signal ends the run while the place still hangs; the next start's first save copies what
    was not."""
    run = tmp_path / "run"
    checkpoint = CheckpointConfig(every=3, keep=2, mirror_to=str(tmp_path / "place"))
    recipe = tiny_recipe(corpus, run, data_ranks=2, checkpoint=checkpoint)
    path = write_recipe(recipe, tmp_path / "tiny.yaml")
    launcher = [sys.executable, "-m", "steptron.launcher.torchrun", "--standalone", "--nproc-per-node", "2"]
    words = [
        *launcher,
        str(Path(__file__).with_name("hanging_place_rank.py")),
        "train",
        str(path),
        "stages.base.tokens=1M",
    ]
    process = Forked(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    reach(run, 8, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 75, said
    assert "Traceback" not in said
    newest = int(checkpoints(run)[-1].removeprefix("step-"))
    assert newest == len(column(run, "step")) > 7
    assert Remote(str(tmp_path / "place" / "tiny")).steps() == []
    steptron("resume", run, f"stages.base.tokens={(newest + 1) * 4 * 32}", "stages.long.tokens=256")
    assert [p.name for p in list_checkpoints(tmp_path / "place" / "tiny")] == checkpoints(run)[::-1]


def test_a_step_by_number(undisturbed, tmp_path):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", undisturbed, run], check=True)
    assert checkpoints(run) == ["step-00000008", "step-00000010", "step-00000016", "step-00000020"]
    refused = steptron("resume", run, "--step", 12, code=2)
    assert refused.stderr.count("\n") == 1
    assert "nearest: 8, 10, 16" in refused.stderr
    steptron("resume", run, "--step", 8)
    assert [line["checkpoint"] for line in ledger(run) if line["event"] == "resume"] == ["step-00000008"]
    assert column(run, "total_loss") == column(undisturbed, "total_loss")
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
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, mirror_to=str(place)))
    path = write_recipe(recipe, tmp_path / "tiny.yaml")
    process = started(path, "stages.long.tokens=1M")
    reach(run, 14, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    newest = run / "checkpoints" / checkpoints(run)[-1]
    assert sorted(p.name for p in list_checkpoints(place / "tiny")) == checkpoints(run)
    refused = steptron("train", path, f"run.dir={tmp_path / 'other'}", code=2)
    assert refused.stderr.count("\n") == 1
    assert (
        f"checkpoint.mirror_to={place}: {place / 'tiny'} holds another run's checkpoints, up to step" in refused.stderr
    )
    assert not (tmp_path / "other" / "recipe.yaml").exists()
    assert f"continue it with `steptron resume {tmp_path / 'other'} --from {place / 'tiny'}`" in refused.stderr
    shutil.copytree(place, tmp_path / "kept")
    (newest / "__0_0.distcp").write_bytes(b"")
    done = steptron("resume", run, "stages.long.tokens=2560")
    assert f"{newest.name} was restored from {place / 'tiny'}" in (run / "ledger.jsonl").read_text()
    resumed = [line for line in ledger(run) if line["event"] == "resume"]
    assert resumed[-1]["checkpoint"] == newest.name
    assert "Traceback" not in done.stderr
    assert column(run, "total_loss")[:10] == column(undisturbed, "total_loss")[:10]

    # The run's own disk is lost.
    new, kept = tmp_path / "new" / "run", tmp_path / "kept"
    refused = steptron("resume", new, "--from", kept, code=2)
    assert f"checkpoint.mirror_to={kept}: there is no recipe.yaml" in refused.stderr
    steptron("resume", new, "--from", kept / "tiny", f"checkpoint.mirror_to={kept}", "stages.long.tokens=2560")
    stopped = step_of(newest)
    assert column(new, "step") == list(range(stopped + 1, 21))
    assert column(new, "total_loss") == column(run, "total_loss")[stopped:]
    assert [line["event"] for line in ledger(new)].count("run_start") == 1, "of the time before"


def test_weights_to_start_from_are_not_forgotten_before_the_first_checkpoint(undisturbed, corpus, tmp_path):
    stages = {"base": tiny_recipe(corpus, tmp_path).stages["base"]}
    checkpoint = CheckpointConfig(every=1000, init_from=str(undisturbed))
    whole, cut = (tiny_recipe(corpus, tmp_path / n, checkpoint=checkpoint, stages=stages) for n in ("whole", "cut"))
    steptron("train", write_recipe(whole, tmp_path / "whole.yaml"))
    process = started(write_recipe(cut, tmp_path / "cut.yaml"))
    reach(tmp_path / "cut", 2, process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "cut" / "checkpoints").exists(), "too late"
    steptron("resume", tmp_path / "cut")
    assert column(tmp_path / "cut", "total_loss") == column(tmp_path / "whole", "total_loss")


def test_a_run_does_not_begin_anew_because_nothing_can_be_read(undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for path in (run / "checkpoints").iterdir():
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"version": 4}))
    written = (run / "metrics.jsonl").read_bytes()
    refused = steptron("resume", run, code=2)
    assert refused.stderr.count("\n") == 1
    assert f"{run / 'checkpoints'} has no complete checkpoint: " in refused.stderr
    assert "step-00000020/manifest.json is not a manifest of version 3; this steptron cannot read it" in refused.stderr
    assert (run / "metrics.jsonl").read_bytes() == written
    shutil.rmtree(run / "checkpoints")
    assert "its folder is empty" in steptron("resume", run, code=2).stderr


def test_a_checkpoint_of_another_recipe_is_refused(undisturbed, tmp_path):
    """Of the same shapes, so that nothing else would tell."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    newest = run / "checkpoints" / "step-00000020"
    recipe = load_recipe(run / "recipe.yaml", ["model.init_std=0.5"])
    write_manifest(replace(read_manifest(newest), recipe_hash=recipe_hash(recipe)), newest)
    refused = steptron("resume", run, code=2)
    assert refused.stderr.count("\n") == 1
    assert "step-00000020 was made by another recipe" in refused.stderr


def test_a_job_goes_back_once(undisturbed, tmp_path, monkeypatch):
    """A launcher or Slurm starts it again with the same command line, in which there is `--step 16`."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this job")
    steptron("resume", run, "--step", 16)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    steptron("resume", run, "--step", 16)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    steptron("resume", run, "--step", 16)
    resumed = [line["checkpoint"] for line in ledger(run) if line["event"] == "resume"]
    assert resumed == ["step-00000016", "step-00000020", "step-00000016"]


PATCHED = """
import os, sys
import steptron.train.loop as loop
from steptron.launcher.leave import leave_with
from steptron.cli.main import main

train_step, steps, where = loop.train_step, 0, sys.argv.pop()

def patched(*args):
    global steps
    steps += 1
    if steps == 4 and os.environ["RANK"] in where:
        raise ValueError("a bug")
    return train_step(*args)

loop.train_step = patched
leave_with(lambda: main(sys.argv[1:]))
"""


@pytest.mark.parametrize("where", ["01", "1"], ids=["both-ranks", "rank-1"])
def test_a_bug_is_shown_once_and_is_in_each_log(corpus, tmp_path, where):
    path = write_recipe(tiny_recipe(corpus, tmp_path / "run", data_ranks=2), tmp_path / "tiny.yaml")
    (tmp_path / "patched.py").write_text(PATCHED)
    words = command("train", path, ranks=2)
    words[words.index("steptron") - 1 : words.index("steptron") + 1] = [str(tmp_path / "patched.py")]
    failed = run_fork([*words, where])
    assert failed.returncode == 1
    assert failed.stderr.count("Traceback") == 1, failed.stderr
    assert failed.stderr.endswith("]: ValueError: a bug\n")
    for rank in where:
        assert "ValueError: a bug" in (tmp_path / "run" / "logs" / f"rank-0000{rank}.log").read_text()
