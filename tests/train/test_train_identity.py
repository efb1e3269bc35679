"""A run is known by its folder: its spelling, place, copies, starts that failed, clocks, and what a kill kept from the
ledger."""

import json
import re
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from steptron.checkpoint.remote import Remote
from steptron.cli.main import main
from steptron.config import identity
from steptron.config.resolve import load_recipe
from steptron.config.schema import LimitsConfig, Recipe
from steptron.monitor.storage import store
from steptron.train import loop, run
from steptron.train.lock import lock

from plane_server import running
from planes import steps_in
from small_runs import column, ledger, steptron, write_recipe
from tiny import tiny_recipe

SHORT = ("stages.base.tokens=512", "stages.long.tokens=512", "stages.long.schedule_tokens=512")
"""Four steps and two; a checkpoint at the end of each stage. A longer stage keeps its learning rate."""
pytestmark = pytest.mark.takes(60)


class Killed(BaseException):
    """The process ends here."""


def small_recipe(corpus: Path, folder: Path) -> Recipe:
    """Return the tiny recipe with a network of two layers: what is computed does not matter here."""
    recipe = tiny_recipe(corpus, folder)
    model = replace(recipe.model, num_layers=2, num_mtp_heads=0)
    stages = {name: replace(s, mtp_weight=0.0, limits=LimitsConfig()) for name, s in recipe.stages.items()}
    return replace(recipe, model=model, stages=stages)


def short_run(corpus: Path, folder: Path, *overrides: str) -> Path:
    """A recipe beside `folder`, which is trained to its end; its path."""
    path = write_recipe(small_recipe(corpus, folder), folder.with_suffix(".yaml"))
    steptron("train", path, *SHORT, *overrides)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def of_kind(folder: Path, *kinds: str) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in ledger(folder) if line["event"] in kinds]


def who(folder: Path) -> identity.Identity:
    found = identity.read(folder)
    assert found is not None
    return found


def refused(*words) -> str:
    """The one line of a command that is refused."""
    said = steptron(*words, code=2).stderr
    assert said.count("\n") == 1
    assert said.startswith("error: ")
    return said


def test_or_resume_knows_its_run_by_any_name_from_any_directory_and_after_a_move(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = short_run(corpus, Path("run")).resolve()
    first = who(tmp_path / "run")
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "other").mkdir()
    tried = [(".", "run"), (".", "./other/../run"), (".", "run/"), (".", "link"), ("other", "../run"), ("/", "")]
    for place, spelling in tried:
        monkeypatch.chdir(tmp_path / place)
        steptron("train", path, "--or-resume", f"run.dir={spelling or tmp_path / 'run'}", *SHORT)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").rename(tmp_path / "moved")
    steptron("train", path, "--or-resume", "run.dir=moved", *SHORT)
    assert of_kind(tmp_path / "moved", "run_start", "resume") == [("run_start", 0)] + [("resume", 6)] * 7
    assert all(not line["changes"] for line in ledger(tmp_path / "moved") if line["event"] == "resume")
    resumed = [line for line in ledger(tmp_path / "moved") if line["event"] == "resume"]
    assert resumed[-1]["moved_from"] == str(tmp_path / "run")
    assert who(tmp_path / "moved").id == first.id
    assert "model.hidden_size" in refused("train", path, "--or-resume", "run.dir=moved", "model.hidden_size=16", *SHORT)


def test_relative_data_are_found_from_anywhere_and_after_a_move_with_and_without_them(corpus, tmp_path, monkeypatch):
    project = tmp_path / "project"
    shutil.copytree(corpus, project / "data")
    monkeypatch.chdir(project)
    path = short_run(Path("data"), Path("run"), "checkpoint.mirror_to=place").resolve()
    assert load_recipe(project / "run" / "recipe.yaml").data.tokenizer == str(project / "data" / "tokenizer.json")
    assert Remote(str(project / "place" / "tiny")).steps() == [6, 4]
    monkeypatch.chdir("/")
    steptron("resume", project / "run", "stages.long.tokens=768")
    steptron("train", path, "--or-resume", f"run.dir={project / 'run'}", SHORT[0], SHORT[2],
             "stages.long.tokens=1024", "checkpoint.mirror_to=place")  # fmt: skip
    (project / "run").rename(tmp_path / "alone")
    steptron("resume", tmp_path / "alone", "stages.long.tokens=1280")
    assert Remote(str(project / "place" / "tiny")).steps()[0] == 9
    (tmp_path / "alone").rename(project / "run")
    steptron("resume", project / "run")
    project.rename(tmp_path / "archive")
    there = tmp_path / "archive"
    steptron("export", "hf", there / "run", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (corpus / "tokenizer.json").read_bytes()
    for tokens in (1536, 1792):  # the second time it is not a move any more
        steptron("resume", there / "run", f"stages.long.tokens={tokens}")
    assert column(there / "run", "step") == list(range(1, 12))
    assert Remote(str(there / "place" / "tiny")).steps()[0] == 11
    assert load_recipe(there / "run" / "recipe.yaml").data.tokenizer == str(there / "data" / "tokenizer.json")
    assert not project.exists()
    assert not Path("/place").exists()


def test_a_copied_folder_is_a_run_of_its_own_and_leaves_the_first_ones_copies_alone(corpus, tmp_path):
    folder, copy, place = tmp_path / "run", tmp_path / "copy", tmp_path / "place" / "run"
    more = ("monitor.wandb.mode=offline", f"checkpoint.mirror_to={place.parent}")
    with running(tmp_path) as server:  # it writes where the run folders are, for those that are called as their run
        short_run(corpus, folder, *more, "run.name=run", f"monitor.server.addresses=[{server.address}]")
        shutil.copytree(folder, copy)
        kept = files_of(place)
        said = refused("resume", copy, "stages.long.tokens=768")
        assert f"{place} holds another run's checkpoints, up to step 6, and {copy} is a copy of a run's folder" in said
        assert f"`steptron resume {copy} run.name=NAME`" in said
        assert "run.name=other cannot change in a run" in refused("resume", folder, "run.name=other")
        done = steptron("resume", copy, "run.name=copy", "stages.long.tokens=768")
        assert f"warning: {copy} is a copy of {folder}, where the run still is" in done.stderr
        steptron("resume", copy, "stages.long.tokens=1024")
        steptron("resume", folder)
    assert files_of(place) == kept
    first, second = who(folder), who(copy)
    assert second.copy_of == first.id != second.id
    assert [line.get("copied_from") for line in ledger(copy) if line["event"] == "resume"] == [str(folder), None]
    uids = [(server.plane(name) / "uid").read_text() for name in ("run", "copy")]
    assert uids == [first.id, second.id]
    assert list(steps_in(server.plane("run"))) == list(range(1, 7))
    assert list(steps_in(server.plane("copy"))) == list(range(1, 9))
    for folder_, ids in (
        (folder, {first.id}),
        (copy, {first.id, second.id}),
    ):  # the copy has what was copied, and its own
        assert {path.name.rpartition("-")[2] for path in folder_.glob("wandb/offline-run-*")} == ids


def test_a_run_is_not_copied_over_another_ones_checkpoints(corpus, tmp_path):
    """Neither where its recipe says so at a start, nor where the place is found to be another's when a checkpoint is
    copied."""
    first, second, place = tmp_path / "first", tmp_path / "second", tmp_path / "place" / "tiny"
    short_run(corpus, first, f"checkpoint.mirror_to={place.parent}")
    short_run(corpus, second, f"checkpoint.mirror_to={tmp_path / 'own'}")
    kept = files_of(place)
    said = refused("resume", second, f"checkpoint.mirror_to={place.parent}", "stages.long.tokens=768")
    assert f"{place} holds another run's checkpoints, up to step 6; give another place" in said
    assert Remote(str(place)).owner() == who(first).id
    shutil.rmtree(tmp_path / "own")
    shutil.copytree(place.parent, tmp_path / "own")
    steptron("resume", second, "stages.long.tokens=768")
    (failed,) = [line["reason"] for line in ledger(second) if line["event"] == "copy_failed"]
    assert failed == (
        f"checkpoint.mirror_to={tmp_path / 'own' / 'tiny'}: it holds another run's checkpoints; "
        "resume this one with another checkpoint.mirror_to"
    )
    assert files_of(place) == files_of(tmp_path / "own" / "tiny") == kept


def test_a_copy_does_not_touch_the_metrics_that_the_first_keeps_elsewhere(corpus, tmp_path):
    folder, copy, elsewhere = tmp_path / "run", tmp_path / "copy", tmp_path / "elsewhere"
    short_run(corpus, folder, f"monitor.store={elsewhere}")
    shutil.copytree(folder, copy)
    kept = files_of(elsewhere)
    for _ in range(2):  # it is refused for as long as it is not changed
        said = refused("resume", copy, "--step", 4)
        assert f"monitor.store={elsewhere} has the metrics of {folder}, and {copy} is a copy of it" in said
    steptron("resume", copy, "--step", 4, f"monitor.store={tmp_path / 'own'}")
    steptron("resume", copy, "--step", 4)
    assert files_of(elsewhere) == kept
    assert list(steps_in(tmp_path / "own")) == [5, 6]


@pytest.mark.parametrize("fault", ["a clock an hour behind", "an older run.json brought back"])
def test_a_server_takes_the_newest_start_whatever(corpus, tmp_path, monkeypatch, fault):
    folder, real = tmp_path / "run", time.time_ns
    with running(tmp_path / "served") as server:
        short_run(corpus, folder, f"monitor.server.addresses=[{server.address}]")
        backup = (folder / identity.NAME).read_text()
        undone = column(folder, "total_loss")
        for peak in (0.1, 0.2):
            if "clock" in fault:
                monkeypatch.setattr(time, "time_ns", lambda peak=peak: real() - int(peak * 36_000e9))
            else:
                (folder / identity.NAME).write_text(backup)
            done = steptron("resume", folder, "--step", 4, f"stages.long.lr.peak={peak}")
            assert "attempt" not in done.stderr
        assert "attempt" not in server.refused()
        with store.connect(server.plane("tiny")) as tables:
            stored = tables.execute("SELECT step, total_loss FROM run ORDER BY step").fetchall()
    found = column(folder, "total_loss")
    assert found[5] != undone[5]
    assert stored == list(zip(range(1, 7), torch.tensor(found, dtype=torch.float32).tolist(), strict=True))


FAILURES = {
    "no data": ("data.tokenizer=nowhere.json", None),
    "no weights to start from": ("checkpoint.init_from=/nowhere", None),
    "no mirror": ("checkpoint.mirror_to=nowhere://bucket", None),
    "out of memory": ("seed=2", (run, "build_engine", torch.OutOfMemoryError)),
    "killed at the build": ("seed=2", (run, "watch_network", Killed)),
    "killed in the first step": ("seed=2", (loop, "train_step", Killed)),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_start_that_failed_before_its_first_step_leaves_the_name_free(corpus, tmp_path, monkeypatch, failure):
    folder = tmp_path / "run"
    override, broken = FAILURES[failure]
    path = write_recipe(small_recipe(corpus, folder), tmp_path / "tiny.yaml")
    folder.mkdir()
    (folder / "notes.txt").write_text("somebody's")
    words = [str(path), *SHORT, override]
    if broken:
        with monkeypatch.context() as patched:
            patched.setattr(broken[0], broken[1], Mock(side_effect=broken[2]))
            with pytest.raises(broken[2]):
                main(["train", *words])
    else:
        refused("train", *words)
    before = (folder / "ledger.jsonl").read_text() if (folder / "ledger.jsonl").exists() else ""
    steptron("train", path, *SHORT, "model.hidden_size=16", *(["--or-resume"] if broken else []))
    assert column(folder, "step") == list(range(1, 7))
    assert load_recipe(folder / "recipe.yaml").model.hidden_size == 16
    assert (folder / "ledger.jsonl").read_text().startswith(before)
    assert (folder / "notes.txt").read_text() == "somebody's"
    assert f"run.dir={folder} holds a run already" in refused("train", path, *SHORT, "model.hidden_size=16")


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints", "ledger.jsonl"])
def test_whatever_is_left_of_a_run_keeps_its_name(corpus, tmp_path, left):
    folder = tmp_path / "run"
    path = short_run(corpus, folder)
    for name in {"metrics.jsonl", "checkpoints", "ledger.jsonl"} - {left}:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)
    before = files_of(folder)
    assert "holds a run already" in refused("train", path, *SHORT)
    assert {k: v for k, v in files_of(folder).items() if k != "run.lock"} == {
        k: v for k, v in before.items() if k != "run.lock"
    }


@pytest.mark.parametrize("step", [4, 6])
def test_a_kill_behind_the_rename_costs_the_ledger_no_line(corpus, tmp_path, monkeypatch, step):
    """Also where the ledger has a line of that step from a past that was undone."""
    folder = tmp_path / "run"
    path = write_recipe(small_recipe(corpus, folder), tmp_path / "tiny.yaml")
    words = ["train", str(path), *SHORT, "checkpoint.background=false"]
    if step == 6:
        steptron(*words)
        words = ["resume", str(folder), "--step", "4"]
    record = loop._record_saved

    def killed(made: run.Run) -> None:
        if (made.folder / "checkpoints" / f"step-{step:08d}").exists():
            raise Killed
        record(made)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_record_saved", killed)
        with pytest.raises(Killed):
            main(words)
    before = of_kind(folder, "checkpoint", "resume")
    for _ in range(2):
        steptron("resume", folder)
    after = {4: [("checkpoint", 4), ("resume", 4), ("checkpoint", 6)], 6: [("checkpoint", 6), ("resume", 6)]}[step]
    assert of_kind(folder, "checkpoint", "resume") == [*before, *after, ("resume", 6)]
    (found,) = [line for line in ledger(folder) if "found" in line]
    assert (found["step"], found["path"]) == (step, f"step-{step:08d}")
    files = json.loads((folder / "checkpoints" / found["path"] / "manifest.json").read_text())["files"]
    assert found["bytes"] == sum(entry["bytes"] for entry in files.values())
    age = datetime.now(UTC) - datetime.fromisoformat(found["written"])
    assert timedelta(0) <= age < timedelta(minutes=10)


def test_a_first_checkpoint_that_is_damaged_is_not_begun_anew_where_the_ledger_does_not_know_it(corpus, tmp_path):
    folder = tmp_path / "run"
    short_run(corpus, folder)
    (folder / "ledger.jsonl").unlink()
    for path in (folder / "checkpoints").glob("*/manifest.json"):
        path.write_text("{}")
    assert "has no complete checkpoint" in refused("resume", folder)


def test_times_in_files_are_utc_wherever_the_machine_is(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        start = datetime.now(UTC)
        short_run(corpus, tmp_path / "run")
        with lock(tmp_path / "run"):
            since = json.loads((tmp_path / "run" / "run.lock").read_text())["since"]
    finally:
        monkeypatch.undo()
        time.tzset()
    lines = (tmp_path / "run" / "logs" / "rank-00000.log").read_text().splitlines()
    stamps = [match[0] for line in lines if (match := re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z(?= )", line))]
    assert len(stamps) == len(lines) > 3
    for stamp in (*stamps, since, *(line["time"] for line in ledger(tmp_path / "run"))):
        assert abs(datetime.fromisoformat(stamp) - start) < timedelta(minutes=30), stamp
