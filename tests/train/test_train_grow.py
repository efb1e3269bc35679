"""A run grows: new stages and sources, longer stages, and forks. Where nothing before the change differs, the losses are
those of a run that was never stopped, bit by bit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from steptron.config import identity
from steptron.config.resolve import load_recipe
from steptron.config.schema import CheckpointConfig, Recipe
from steptron.monitor.dashboard.documents import Dashboard
from steptron.train.lock import lock

from small_runs import column, ledger, steptron, write_recipe
from tiny import tiny_recipe

pytestmark = pytest.mark.takes(20)
STEP = 4 * 32
"""Tokens of a step of stage base."""
LONG_STEP = 2 * 128
"""Tokens of a step of stage long."""


def recipe_of(corpus: Path, folder: Path) -> Recipe:
    """Return a recipe with stages of four and two steps, a checkpoint every second step, and samples left out."""
    recipe = tiny_recipe(corpus, folder, checkpoint=CheckpointConfig(every=2, keep=9))
    base, long = recipe.stages.values()
    base = replace(base, tokens=4 * STEP, mix={"prose": 1.0}, lr=replace(base.lr, warmup=STEP, decay=STEP))
    long = replace(long, tokens=2 * LONG_STEP, mix={"prose": 0.5, "code": 0.5})
    data = replace(recipe.data, skip=((5, 5),))  # a fork at step 4 must leave them out too
    return replace(recipe, data=data, stages={"base": base, "long": long})


def added(corpus: Path) -> list[str]:
    """Return overrides that add a source, and a stage of two steps that draws from it."""
    stage = f"tokens: {2 * STEP}, seq_len: 32, batch_size: 4, micro_batch: 2, mix: {{more: 3, code: 1}}"
    return [f"+data.sources.more={{path: '{corpus / 'prose'}'}}", f"+stages.more={{{stage}, lr: {{peak: 0.001}}}}"]


@pytest.fixture(scope="module")
def parent(corpus, tmp_path_factory) -> Path:
    """The folder of a run of six steps, with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("grow") / "parent"
    steptron("train", write_recipe(recipe_of(corpus, folder), folder.with_suffix(".yaml")))
    return folder


@pytest.fixture(scope="module")
def whole(corpus, parent) -> Path:
    """The folder of a run that had the source and the stage from its start, eight steps, and was never stopped."""
    folder = parent.with_name("whole")
    steptron("train", parent.with_suffix(".yaml"), f"run.dir={folder}", *added(corpus))
    return folder


def refused(*words: object) -> str:
    """Return the one line of a command that is refused."""
    said = steptron(*words, code=2).stderr
    assert said.count("\n") == 1
    assert said.startswith("error: ")
    return said


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_stage_and_a_source_are_added_at_a_resume(corpus, parent, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(parent, run)
    steptron("resume", run, *added(corpus))
    assert column(run, "step") == list(range(1, 9))
    for name in ("total_loss", "grad_norm", "lr", "tokens_by_source"):
        assert column(run, name) == column(whole, name), name
    assert ledger(run)[-1]["tokens_by_source"] == ledger(whole)[-1]["tokens_by_source"]
    assert "more" in ledger(run)[-1]["tokens_by_source"]


def test_a_fork_continues_with_weights_optimizer_and_data_of_its_parent(corpus, parent, whole, monkeypatch):
    before, fork = files_of(parent), parent.with_name("fork")
    command = ("fork", parent, "fork", "--step", 4, *added(corpus))
    with lock(parent, 0.0):  # as if the parent were in training
        said = steptron(*command).stdout
    assert f"forked from tiny at step 4: {fork}" in said
    assert files_of(parent) == before
    assert column(fork, "step") == [5, 6, 7, 8]
    for name in ("total_loss", "grad_norm", "lr", "tokens"):
        assert column(fork, name) == column(whole, name)[4:], name
    ours, theirs = identity.read(fork), identity.read(parent)
    assert ours is not None and theirs is not None and ours.parent is not None  # noqa: PT018
    assert ours.id != theirs.id
    link = {"id": theirs.id, "name": "tiny", "place": str(parent), "step": 4}
    assert vars(ours.parent) == link
    assert f"forked from tiny at step 4: {parent}" in steptron("inspect", fork).stdout
    assert json.loads(Dashboard(fork).document("run"))["parent"] == link
    assert load_recipe(fork / "recipe.yaml").run.name == "fork"
    first, *_ = ledger(fork)
    assert (first["event"], first["step"], first["parent"]) == ("fork", 4, link)
    assert first["changes"]["run.name"] == ["tiny", "fork"]
    assert steptron("monitor", "replay", fork).stdout.count("as in the ledger") == 1
    assert f"{fork} holds a run already" in refused(*command)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    steptron(*command)
    assert [line["event"] for line in ledger(fork) if line["event"] in ("fork", "resume")] == ["fork", "resume"]


def test_a_longer_stage_keeps_its_rates_or_takes_the_new_ones_but_not_unasked(parent, tmp_path):
    run, tokens = tmp_path / "run", 4 * LONG_STEP
    shutil.copytree(parent, run)
    before = files_of(run)
    said = refused("resume", run, f"stages.long.tokens={tokens}")
    assert (
        f"stages.long.tokens={tokens} stretches the stage's schedules, which end at {2 * LONG_STEP} tokens now" in said
    )
    key = "stages.long.schedule_tokens"
    assert f"{key}={2 * LONG_STEP} keeps the old rates, {key}={tokens} takes the new ones" in said
    assert files_of(run) == before
    keep = (f"stages.long.tokens={tokens}", f"{key}={2 * LONG_STEP}")
    steptron("resume", run, *keep)
    steptron("fork", parent, "longer", "--step", 4, f"run.dir={tmp_path / 'longer'}", *keep)
    last = column(parent, "lr")[-1]
    expected = [*column(parent, "lr")[4:], last, last]
    assert column(run, "lr")[4:] == column(tmp_path / "longer", "lr") == expected
    assert column(run, "total_loss")[4:] == column(tmp_path / "longer", "total_loss")


def test_a_fork_may_change_the_mix_of_its_present_stage_from_here_on(parent, tmp_path):
    mix = "stages.base.mix={code: 1}"
    fork = tmp_path / "fork"
    steptron(
        "fork", parent, "other", f"run.dir={fork}", "--step", 2, mix, "~stages.long", f"stages.base.tokens={3 * STEP}"
    )
    assert column(fork, "tokens_by_source") == [{"code": STEP}]
    steptron("resume", fork, f"stages.base.tokens={4 * STEP}", f"stages.base.schedule_tokens={4 * STEP}")
    assert column(fork, "tokens_by_source") == [{"code": STEP}] * 2
    assert ledger(fork)[-1]["tokens_by_source"] == {"prose": 2 * STEP, "code": 2 * STEP}


REFUSED = {
    "an unknown step": (["--step", "5"], "--step 5: {checkpoints} has no checkpoint of that step; nearest: 2, 4, 6"),
    "another content": (["data.sources.code.path={prose}"], "data.sources.code does not hold the tokens that the run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_fork_that_could_not_use_the_state_is_refused_and_leaves_its_name_free(corpus, parent, case):
    words, message = REFUSED[case]
    words = [word.format(prose=corpus / "prose") if word.startswith("data") else word for word in words]
    assert message.format(checkpoints=parent / "checkpoints") in refused("fork", parent, "new", *words)
    assert not (parent.with_name("new") / "checkpoints").exists()
