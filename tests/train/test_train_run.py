"""Whole runs through the command line: the same twice, the same after a kill, the same on two ranks."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace

import pytest
from steptron.config.resolve import load_recipe, to_yaml
from steptron.config.schema import CheckpointConfig, Recipe
from steptron.doctor.recipe import sizes_of
from torch.distributed.checkpoint import FileSystemReader

from forks import Forked
from forks import run as run_fork
from small_runs import column, command, ledger, metrics, start_interpreter, steptron, write_recipe
from tiny import tiny_recipe

pytestmark = pytest.mark.takes(100)
LONGER = ("stages.long.tokens=1792", "stages.long.schedule_tokens=1792")
"""Two steps more, with the schedule of the learning rate stretched."""


def short_recipe(corpus, run_dir, **changes) -> Recipe:
    """Return the tiny recipe with two stages of five steps; checkpoints at steps 4, 5, 8 and 10, of which three stay."""
    recipe = tiny_recipe(corpus, run_dir, **({"checkpoint": CheckpointConfig(every=4, keep=3)} | changes))
    return replace(recipe, stages={name: replace(s, tokens=s.tokens // 2) for name, s in recipe.stages.items()})


@pytest.fixture(scope="session")
def undisturbed(corpus, tmp_path_factory):
    """The folder of a run of ten steps that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = short_recipe(corpus, folder / "run")
    steptron("train", write_recipe(recipe, folder / "tiny.yaml"))
    return folder / "run"


def test_two_runs_have_identical_losses(undisturbed, corpus, tmp_path):
    steptron("train", write_recipe(short_recipe(corpus, tmp_path / "run"), tmp_path / "tiny.yaml"))
    assert column(tmp_path / "run", "total_loss") == column(undisturbed, "total_loss")
    assert column(tmp_path / "run", "grad_norm") == column(undisturbed, "grad_norm")


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_is_bitwise_the_undisturbed_run(undisturbed, corpus, tmp_path, ranks):
    path = write_recipe(short_recipe(corpus, tmp_path / "run", data_ranks=ranks), tmp_path / "tiny.yaml")
    if ranks > 1:
        undisturbed = tmp_path / "undisturbed"
        steptron("train", path, f"run.dir={undisturbed}", ranks=ranks)
    kill_at = random.randint(2, 7)  # any step will do: the run must not depend on it
    process = Forked(command("train", path, ranks=ranks), stdout=subprocess.DEVNULL)
    written = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and (not written.exists() or written.read_text().count("\n") < kill_at):
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed"
    # The launcher gives every rank a session of its own: all are found by the recipe in their command lines.
    subprocess.run(["pkill", "-KILL", "-f", str(path)], check=True)
    assert process.wait() == -signal.SIGKILL
    assert written.read_text().count("\n") < 10
    steptron("resume", tmp_path / "run", ranks=ranks)
    assert column(tmp_path / "run", "step") == list(range(1, 11)), f"killed at {kill_at}"
    assert column(tmp_path / "run", "total_loss") == column(undisturbed, "total_loss"), f"killed at {kill_at}"
    assert column(tmp_path / "run", "grad_norm") == column(undisturbed, "grad_norm"), f"killed at {kill_at}"
    assert "resume" in [line["event"] for line in ledger(tmp_path / "run")]


@pytest.mark.parametrize(
    ("matrices", "peak", "start", "make", "steps"),
    [("muon", 0.01, start_interpreter, tiny_recipe, 20), ("adamw", 0.003, run_fork, short_recipe, 10)],
    ids=["muon, new interpreters", "adamw, forks"],
)
def test_two_ranks_have_the_losses_of_one(corpus, tmp_path, matrices, peak, start, make, steps, monkeypatch):
    path = write_recipe(make(corpus, tmp_path / "unused", data_ranks=2), tmp_path / "tiny.yaml")
    (tmp_path / "held.txt").write_text("the blue fox sees one very old dog over there. " * 20)
    words = ("--out", tmp_path / "held", "--tokenizer", corpus / "tokenizer.json")
    steptron("data", "build", tmp_path / "held.txt", *words)
    changes = (
        *(f"optim.matrix_optimizer={matrices}", f"stages.base.lr.peak={peak}"),
        *(f"evaluation.sources={{held: {{path: {tmp_path / 'held' / 'held'}}}}}", f"evaluation.every={3 * steps // 4}"),
    )
    steptron("train", path, *changes, f"run.dir={tmp_path / 'one'}")
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    two = steptron("train", path, *changes, f"run.dir={tmp_path / 'two'}", ranks=2, start=start)
    assert not re.search(r"\w*Warning\b", two.stderr), "nothing deprecated is called from start to end"
    for name in ("loss", "mtp_loss", "total_loss", "grad_norm"):
        assert column(tmp_path / "two", name) == pytest.approx(column(tmp_path / "one", name), rel=1e-5), name
    two, one = ([line["eval/loss"] for line in metrics(tmp_path / n) if "eval/loss" in line] for n in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-5)
    assert len(column(tmp_path / "one", "loss")) == steps
    assert len(one) == 3, "at the ends of stages, and once between them"


def test_bf16_trains_and_stays_near_fp32(undisturbed, corpus, tmp_path):
    path = write_recipe(short_recipe(corpus, tmp_path / "run", precision="bf16"), tmp_path / "tiny.yaml")
    steptron("train", path)
    ours, exact = column(tmp_path / "run", "total_loss"), column(undisturbed, "total_loss")
    assert ours != exact
    assert ours == pytest.approx(exact, rel=0.05)


def test_gradient_accumulation_changes_nothing(undisturbed, corpus, tmp_path):
    path = write_recipe(short_recipe(corpus, tmp_path / "run"), tmp_path / "tiny.yaml")
    steptron("train", path, "stages.base.micro_batch=1", "stages.long.micro_batch=1")
    assert column(tmp_path / "run", "total_loss") == pytest.approx(column(undisturbed, "total_loss"), rel=1e-5)
    assert column(tmp_path / "run", "grad_norm") == pytest.approx(column(undisturbed, "grad_norm"), rel=1e-4)


def test_a_cut_checkpoint_is_skipped_for_the_one_before(undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    newest = run / "checkpoints" / "step-00000010"
    largest = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    steptron("resume", run)
    skipped = [line for line in ledger(run) if line["event"] == "checkpoint_skipped"]
    assert len(skipped) == 1
    assert "step-00000010" in skipped[0]["reason"]
    assert largest.name in skipped[0]["reason"]
    resumed = [line for line in ledger(run) if line["event"] == "resume"]
    assert resumed[0]["checkpoint"] == "step-00000008"
    assert column(run, "total_loss") == column(undisturbed, "total_loss")


def test_resume_may_lengthen_a_stage_but_not_change_the_model(undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    failed = steptron("resume", run, "model.num_layers=4", code=2)
    assert failed.stderr.count("\n") == 1
    assert "model.num_layers" in failed.stderr
    steptron("resume", run, *LONGER)
    assert column(run, "step") == list(range(1, 13))
    assert column(run, "total_loss")[:10] == column(undisturbed, "total_loss")


def test_steps_that_are_skipped_by_hand_are_left_out_for_good(undisturbed, tmp_path):
    """The samples of steps 7 and 8 give place to the next ones, also when the run continues from there again."""
    run, losses = tmp_path / "run", []
    shutil.copytree(undisturbed, run)
    before = (run / "recipe.yaml").read_text()
    refused = steptron("resume", run, "--step", "5", "data.skip=[[4,4]]", code=2)
    assert refused.stderr.count("\n") == 1
    assert "data.skip: step 4 of [4,4] is done" in refused.stderr
    assert (run / "recipe.yaml").read_text() == before
    for words in (["data.skip=[[7,8]]"], []):
        steptron("resume", run, "--step", "5", *words)
        losses.append(column(run, "total_loss"))
    (skip,) = (line for line in ledger(run) if line["event"] == "skip")
    assert (skip["step"], skip["steps"], skip["windows"]) == (5, [7, 8], [["long", 2, 6]])
    assert losses[0] == losses[1]
    assert losses[0][:6] == column(undisturbed, "total_loss")[:6]
    assert all(a != b for a, b in zip(losses[0][6:], column(undisturbed, "total_loss")[6:], strict=True))


def test_a_run_that_is_past_a_stage_does_not_need_its_ranks_again(undisturbed, tmp_path):
    """`--or-resume` asks for the ranks of the stage that comes, and not for those of the first one."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    steptron("train", run / "recipe.yaml", "--or-resume", f"run.dir={run}", "+stages.base.parallel={ranks: 2}", *LONGER)
    assert column(run, "step") == list(range(1, 13))


def test_limits_can_be_switched_on_in_a_running_job(undisturbed, tmp_path):
    """By an override at resume; the ledger has what changed, and the losses differ from the first step with them."""
    loss = {}
    for name, override in {"free": [], "limited": ["+stages.long.limits.routed.1=0.001"]}.items():
        run = tmp_path / name
        shutil.copytree(undisturbed, run)
        steptron("resume", run, *LONGER, *override)
        loss[name] = column(run, "total_loss")[10:]
        stage = [line for line in ledger(run) if line["event"] == "stage_start"][-1]
        assert stage["settings"]["limits"]["routed"].get("1") == (0.001 if override else None)
    assert all(a != b for a, b in zip(loss["free"], loss["limited"], strict=True))


def test_an_expert_back_end_that_cannot_run_is_refused(undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    refused = steptron("resume", run, *LONGER, "kernels.experts=triton", code=2)
    assert refused.stderr.count("\n") == 1
    assert "kernels.experts=triton cannot run here: " in refused.stderr


def test_another_expert_back_end_has_the_same_losses(undisturbed, corpus, tmp_path):
    path = write_recipe(short_recipe(corpus, tmp_path / "run"), tmp_path / "tiny.yaml")
    steptron("train", path, "kernels.experts=batched")
    assert "experts: batched, as the recipe says" in (tmp_path / "run" / "logs" / "rank-00000.log").read_text()
    assert column(tmp_path / "run", "total_loss") == pytest.approx(column(undisturbed, "total_loss"), rel=1e-5)


def test_a_run_folder_that_exists_is_not_touched(undisturbed, corpus, tmp_path):
    path = write_recipe(short_recipe(corpus, undisturbed), tmp_path / "tiny.yaml")
    before = (undisturbed / "metrics.jsonl").read_bytes()
    failed = steptron("train", path, code=2)
    assert failed.stderr.count("\n") == 1
    assert f"steptron resume {undisturbed}" in failed.stderr
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_an_error_on_two_ranks_is_printed_once(corpus, tmp_path):
    path = write_recipe(short_recipe(corpus, tmp_path / "run", data_ranks=2), tmp_path / "tiny.yaml")
    failed = steptron("train", path, "stages.base.batch_size=3", ranks=2, code=2)
    assert failed.stderr.count("stages.base.batch_size=3") == 1
    assert "nearest: 2, 4" in failed.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 2.5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "none", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(corpus, tmp_path, small_disk):
    recipe = tiny_recipe(corpus, small_disk / "run", checkpoint=CheckpointConfig(every=2, keep=20))
    failed = steptron("train", write_recipe(recipe, tmp_path / "tiny.yaml"), code=1)
    assert failed.stderr.count("\n") == 1
    assert "No space left on device" in failed.stderr
    kept = sorted(path.name for path in (small_disk / "run" / "checkpoints").iterdir())
    assert kept
    assert all(name.startswith("step-") for name in kept)
    shutil.move(small_disk / "run", tmp_path / "run")
    steptron("resume", tmp_path / "run", "checkpoint.keep=2")
    assert column(tmp_path / "run", "step") == list(range(1, 21))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_takes_nothing_is_one_line_at_start_and_at_resume(undisturbed, corpus, tmp_path, small_disk):
    path = write_recipe(short_recipe(corpus, small_disk / "new"), tmp_path / "tiny.yaml")
    (small_disk / "old").mkdir()
    shutil.copy(undisturbed / "recipe.yaml", small_disk / "old")
    with (small_disk / "filling").open("wb", buffering=0) as filling, suppress(OSError):
        while filling.write(bytes(4096)):
            pass
    for words, ranks in ((("train", path), 1), (("resume", small_disk / "old"), 2)):
        failed = steptron(*words, ranks=ranks, code=2)
        assert failed.stderr.startswith(f"error: {small_disk}"), failed.stderr
        assert "cannot be written: No space left on device; " in failed.stderr
        assert failed.stderr.count("\n") == 1, failed.stderr
    (small_disk / "filling").unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for words in (("train", path, f"run.dir={small_disk / 'newer'}"), ("resume", small_disk / "old")):
        failed = steptron(*words, code=2)
        assert "cannot be written: Read-only file system; " in failed.stderr
        assert failed.stderr.count("\n") == 1, failed.stderr


def test_inspect_tells_stages_sources_and_damage(undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    summary = json.loads(steptron("inspect", run, "--json").stdout)
    assert [(stage["name"], stage["done"]) for stage in summary["stages"]] == [("base", 640), ("long", 1280)]
    assert summary["step"] == 10
    assert sum(summary["tokens_by_source"].values()) == summary["tokens"] == 1920
    for stage in summary["stages"]:
        sources = summary["sources"][stage["name"]].values()
        assert sum(spent["tokens"] for spent in sources) == stage["done"]
        assert all(0 < spent["unmasked"] <= spent["tokens"] for spent in sources)
    assert [c["problem"] for c in summary["checkpoints"]] == [None] * 3
    (run / "checkpoints" / "step-00000010" / "manifest.json").unlink()
    shown = steptron("inspect", run).stdout
    assert "step-00000010" in shown
    assert "tokens by stage and source" in shown
    assert "manifest.json" in shown
    assert json.loads(steptron("inspect", run, "--json").stdout)["step"] == 8


def test_inspect_tells_what_a_resume_would_do(undisturbed, tmp_path):
    run, place = tmp_path / "run", tmp_path / "place"
    shutil.copytree(undisturbed, run)

    def told() -> tuple[str, list[str]]:
        resume = json.loads(steptron("inspect", run, "--json").stdout)["resume"]
        assert resume["command"] == f"steptron resume {run}"
        assert resume["owner"] is None
        return resume["does"], resume["skips"]

    assert told() == ("continues from step-00000010, and has nothing left to do: its last stage is done", [])
    (run / "checkpoints" / "step-00000010" / "manifest.json").unlink()
    does, (why,) = told()
    assert does == "continues from step-00000008"
    assert "step-00000010" in why
    assert "manifest.json" in why
    shown = " ".join(steptron("inspect", run).stdout.split())
    assert "continues from step-00000008" in shown
    assert "not " in shown
    recipe = load_recipe(run / "recipe.yaml")
    copied = replace(recipe, checkpoint=replace(recipe.checkpoint, mirror_to=str(place)))
    (run / "recipe.yaml").write_text(to_yaml(copied))
    assert told()[0] == f"looks for a copy in {place}, or continues from step-00000008"
    (run / "recipe.yaml").write_text(to_yaml(recipe))
    for step in (5, 8):
        (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").unlink()
    does, why = told()
    assert does == "is refused: no checkpoint is complete"
    assert len(why) == 3
    shutil.rmtree(run / "checkpoints")
    (run / "ledger.jsonl").unlink()
    assert told() == ("begins at the first step", [])


def test_a_run_can_start_from_the_weights_of_another(undisturbed, corpus, tmp_path):
    steptron("export", "hf", undisturbed, tmp_path / "hf", "--dtype", "fp32")
    steptron("import", "hf", tmp_path / "hf", tmp_path / "imported")
    path = write_recipe(short_recipe(corpus, tmp_path / "unused"), tmp_path / "tiny.yaml")
    for name, start in (("a", undisturbed), ("b", tmp_path / "imported")):
        steptron("train", path, f"run.dir={tmp_path / name}", f"checkpoint.init_from={start}", "stages.base.tokens=512")
    assert column(tmp_path / "a", "total_loss") == column(tmp_path / "b", "total_loss")
    assert column(tmp_path / "a", "loss")[0] < column(undisturbed, "loss")[0] - 1.0


def test_the_policy_ends_a_run_and_warnings_reach_the_terminal(corpus, tmp_path):
    """An expert below 0.99 of its layer's median in two steps is enough here."""
    death = "monitor.detectors.expert_death"
    path = write_recipe(short_recipe(corpus, tmp_path / "run"), tmp_path / "tiny.yaml")
    stopped = steptron(
        "train",
        path,
        *("monitor.level=full", "monitor.probes=[layers.*.atention.o_proj]"),
        *("monitor.policy.actions.expert_death=stop", f"{death}.activation=0.99", f"{death}.clear_activation=0.999"),
        f"{death}.raise_after_steps=2",
        code=3,
    )
    warning, *alarms, error = stopped.stderr.splitlines()
    assert alarms
    assert all(line.startswith("warning: step 2: ") and line.endswith("; act: stop") for line in alarms), stopped.stderr
    assert warning.startswith("warning: monitor.probes: no module is called layers.*.atention.o_proj; near: layers.")
    assert warning.removeprefix("warning: ") in (tmp_path / "run" / "logs" / "rank-00000.log").read_text()
    assert error.startswith("error: step 2: ")
    assert "the policy ends the run, saved at step 1" in error
    assert column(tmp_path / "run", "step") == [1]
    assert ledger(tmp_path / "run")[-1]["event"] == "run_end"


def test_the_doctor_knows_what_a_run_writes(undisturbed, corpus, tmp_path):
    recipe = short_recipe(corpus, tmp_path / "run")
    path = write_recipe(recipe, tmp_path / "tiny.yaml")
    assert steptron("doctor", path).stdout.endswith("nothing required is missing\n")
    stored = FileSystemReader(undisturbed / "checkpoints" / "step-00000010").read_metadata().state_dict_metadata
    stored_bytes = sum(t.size.numel() * t.properties.dtype.itemsize for t in stored.values())
    assert sizes_of(recipe).checkpoint == stored_bytes
    failed = steptron("doctor", path, f"run.dir={undisturbed}", "model.vocab_size=256", code=1).stdout
    assert failed.endswith("failed: data, run.dir\n")
