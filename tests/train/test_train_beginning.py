"""The beginning of a run: banner, dry run, origin, and the profile of its first steps."""

import gzip
import json
import re
import shlex
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from steptron.checkpoint.manifest import list_checkpoints, read_manifest
from steptron.config.monitoring import WandbConfig
from steptron.config.schema import LrConfig
from steptron.model.flops import num_active_parameters, num_parameters
from steptron.monitor.dashboard.documents import Dashboard
from steptron.train import profile as profiles
from steptron.train.profile import Profile

from small_runs import ledger, metrics, steptron, write_recipe
from tiny import tiny_recipe


@pytest.fixture(scope="module")
def outputs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, bool], str, str]:
    """Return a run's folder; the output of its dry run, and what that has left; and both outputs of the run itself.

    The run has two steps, and the second one is profiled.
    """
    folder = tmp_path_factory.mktemp("beginning")
    recipe = tiny_recipe(corpus, folder / "run")
    recipe = replace(
        recipe,
        stages={"base": replace(recipe.stages["base"], tokens=2 * 4 * 32, lr=LrConfig(peak=0.01))},
        monitor=replace(recipe.monitor, wandb=WandbConfig(mode="offline"), level="light"),
    )
    path = write_recipe(recipe, folder / "tiny.yaml")
    dry = steptron("train", path, "--dry-run")
    run = folder / "run"
    left = {name: (run / name).exists() for name in ("recipe.yaml", "checkpoints", "wandb")}
    left["steps"] = bool(metrics(run))
    done = steptron("train", path, "monitor.wandb.mode=disabled", "--profile", "2:2")
    return run, dry.stdout + dry.stderr, left, done.stdout, done.stderr


def test_a_dry_run_does_all_but_the_first_step(outputs) -> None:
    run, said, left, *_ = outputs
    assert left == {"recipe.yaml": True, "checkpoints": False, "wandb": False, "steps": False}
    assert f"dry run: {run} is ready, and no step was made" in said
    assert said.startswith("model   ")


def test_the_banner_comes_once_and_before_the_steps(outputs) -> None:
    run, _, _, out, _ = outputs
    model = tiny_recipe(run, run).model
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["model", "layout", "device", "data", "steps", "run"]
    assert f"{num_parameters(model):,} parameters, {num_active_parameters(model):,} active" in lines[0]
    assert re.fullmatch(r"layout  1 rank", lines[1])
    assert re.match(r"device  cpu, \d+ threads? a rank", lines[2])
    assert re.match(r"data    prose, code \(\w+\)", lines[3])
    assert lines[4] == "steps   2 for 256 tokens: base 2"
    assert lines[5] == f"run     {run}"
    assert out.count("model   ") == 1


def test_the_progress_line_has_what_a_person_looks_for(outputs) -> None:
    run, _, _, out, _ = outputs
    last = [line for line in out.splitlines() if "step 2/2" in line][-1]
    line = metrics(run)[-1]
    assert f"loss {line['loss']:.4f}" in last
    assert f"grad norm {line['grad_norm']:.3g}" in last
    assert f"MFU {line['mfu']:.0%}" in last
    assert re.search(r" tokens/s · MFU \d+% · \d+\.\d GiB · lr .* · ETA 0:00$", last)


def test_the_origin_is_in_ledger_checkpoint_and_report(outputs) -> None:
    run, *_ = outputs
    started = [line for line in ledger(run) if line["event"] == "run_start"]
    origin = started[-1]["origin"]
    assert origin["host"] == socket.gethostname()
    assert {"commit", "command", "steptron", "python", "torch"} <= set(origin)
    assert shlex.split(origin["command"])
    assert read_manifest(list_checkpoints(run / "checkpoints")[0]).origin == origin
    dashboard = Dashboard(run)
    dashboard.refresh()
    assert json.loads(dashboard.document("run"))["origin"] == origin


def test_the_profile_is_of_the_steps_that_were_named(outputs) -> None:
    run, _, _, out, _ = outputs
    folder = run / "profile" / "steps-2-2"
    assert f"profile: {folder}" in out
    with gzip.open(folder / "trace.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert any("Backward" in name for name in names)
    assert "aten::" in (folder / "memory.txt").read_text()


@pytest.mark.parametrize(
    ("steps", "done", "calls"),
    [
        (range(2, 4), 5, ["begin 2", "end 3"]),
        (range(4, 9), 5, ["begin 4", "end 5"]),
        (range(6, 8), 5, []),
        (range(0), 5, []),
    ],
    ids=["whole", "the run ends before", "never reached", "none"],
)
def test_a_profile_begins_before_its_first_step_and_ends_after_its_last(
    steps: range, done: int, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    now = 0

    def begin(profile: Profile) -> None:
        seen.append(f"begin {now}")
        profile._profile = "a profile"

    def end(profile: Profile) -> None:
        seen.append(f"end {now}")
        profile._profile, profile._steps = None, range(0)

    monkeypatch.setattr(profiles.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(Profile, "_begin", begin)
    monkeypatch.setattr(Profile, "_end", end)
    with Profile(steps, tmp_path) as profile:
        for now in range(1, done + 1):
            with profile.step(now):
                pass
    assert seen == calls


@pytest.mark.parametrize("steps", ["3", "0:2", "4:3", "a:b", "1:2:3", ":"])
def test_steps_of_a_profile_that_are_none(steps: str) -> None:
    done = steptron("train", "demo", "--profile", steps, code=2)
    assert f"argument --profile: {steps} must be two steps A:B" in done.stderr


def test_a_dry_run_continues_nothing() -> None:
    done = steptron("train", "demo", "--dry-run", "--or-resume", code=2)
    assert "not allowed with argument" in done.stderr
