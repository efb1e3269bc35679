"""Faults planted in real runs: each is seen within the steps that it may take, is named, and nothing else is raised."""

import os
import re
from dataclasses import replace

import pytest
from faulty_runs import (
    EXPERT,
    LAYER,
    FaultyJob,
    Outcome,
    acts,
    explode,
    faulty_recipe,
    planted,
    resume,
    run,
    run_groups,
)
from steptron.config.schema import ExpertMeshConfig, LimitsConfig, ParallelConfig
from steptron.monitor.detect.replay import replay
from steptron.monitor.storage.store import connect

from small_runs import ledger

pytestmark = pytest.mark.takes(60)

START, STEPS = 30, 60
QUIET_STEPS = int(os.environ.get("STEPTRON_QUIET_STEPS", "240"))
"""`make chaos` makes 2,000 of them."""
SICK = {  # by fault: detector, first step, and steps that it may take
    "explode": ("blow_up", START, 10),
    "decay": ("expert_death", START, 15),
    "starve": ("idle_expert", 215, 20),  # loads are judged from step 200 on
}
POISON = range(40 * 16, 41 * 16)
"""What step 41 reads."""


@pytest.fixture(scope="module")
def outcomes(corpus, tmp_path_factory) -> dict[str, Outcome]:
    """All runs: two groups of one rank and one of two ranks at a time."""
    folder = tmp_path_factory.mktemp("faults")

    def job(name: str, steps: int = STEPS, policy=None, ranks: int = 1, **faults) -> FaultyJob:
        recipe = faulty_recipe(corpus, folder / name, steps, policy, ranks)
        return FaultyJob(recipe=recipe, **faults)

    sick = {fault: job(fault, start + 30, fault=(fault, {"start": start})) for fault, (_, start, _) in SICK.items()}
    router = job("router 1", 40, fault=("break_router", {"at": 25, "rank": 0}))
    bad = {
        "router, 1 rank": replace(router, then=router.recipe),
        "poison": job("poison", poison=POISON),
        "skip": job("skip", policy=acts(loss_spike="skip"), poison=POISON),
    }
    quiet = job("quiet", QUIET_STEPS, ranks=2)
    quiet = replace(quiet, recipe=replace(quiet.recipe, parallel=ParallelConfig(expert=ExpertMeshConfig(ep=2))))
    two = {
        "router, 2 ranks": job("router 2", 40, ranks=2, fault=("break_router", {"at": 25, "rank": 1})),
        "nan": job("nan", 40, ranks=2, after_backward=("not_a_number", {"at": START, "rank": 1})),
        "slow": job("slow", 45, ranks=2, fault=("slow", {"start": 25, "rank": 1, "seconds": 0.3})),
    }
    return run_groups((1, bad), (1, sick), (2, two | {"quiet": quiet}))


@pytest.mark.parametrize(
    ("name", "newest"), [("router, 1 rank", "step-00000040"), ("router, 2 ranks", "step-00000020")]
)
def test_a_router_that_is_not_finite_stops_the_run_and_saves_nothing(outcomes, name, newest):
    broken = outcomes[name]
    said = re.match(
        r"RouterError 3: step 25: router logits of layer 1 are NaN or infinite on rank (\d); nothing was saved",
        broken.error,
    )
    assert said
    assert int(said[1]) == 0, "the shard is gathered: every rank's router is broken, the first is named"
    assert "router logits of layer 1" in broken.of_kind("run_end")[0]["reason"]
    assert sorted(path.name for path in (broken.folder / "checkpoints").glob("step-*"))[-1] == newest


def test_after_a_broken_router_the_run_goes_on_from_its_checkpoint(outcomes):
    broken = outcomes["router, 1 rank"]
    assert broken.of_kind("resume")[0]["checkpoint"] == "step-00000020"
    assert broken.of_kind("decision")[0]["judged"] == "judged/step-00000025.npz"
    assert broken.column("step") == list(range(1, 41))


@pytest.mark.parametrize("fault", SICK)
def test_a_sick_expert_is_seen_and_named(outcomes, fault):
    detector, start, within = SICK[fault]
    [alarm] = outcomes[fault].of_kind("alarm")
    assert alarm["detector"] == detector
    assert start <= alarm["step"] <= start + within
    assert (alarm["where"]["layer"], alarm["where"]["expert"]) == (LAYER, EXPERT)


def test_a_poisoned_batch_is_seen_at_that_very_step(outcomes):
    raised = outcomes["poison"].of_kind("alarm")
    assert {alarm["step"] for alarm in raised} == {41}
    assert "loss_spike" in {alarm["detector"] for alarm in raised} <= {"loss_spike", "grad_norm_spike"}


def test_a_skipped_step_leaves_weights_alone_and_is_marked(outcomes):
    skip = outcomes["skip"]
    [decision] = skip.of_kind("decision")
    assert (decision["step"], decision["act"]) == (41, "skip")
    assert [step for step, act in zip(skip.column("step"), skip.column("act"), strict=True) if act == "skip"] == [41]
    loss = skip.column("total_loss")
    assert loss[40] > loss[39] + 0.7
    assert loss[41] < loss[39] + 0.3
    assert loss[41] != outcomes["poison"].column("total_loss")[41], "there the update was made"


def test_quiet_steps_raise_nothing(outcomes):
    """On two ranks with experts of their own, of which one could be slow or overloaded."""
    around = outcomes["quiet"].of_kind("detectors")[0]["around"]
    assert (around["world_size"], around["ep"]) == (2, 2)
    assert outcomes["quiet"].of_kind("alarm") == []
    assert outcomes["quiet"].column("step") == list(range(1, QUIET_STEPS + 1))


def test_a_nan_gradient_in_the_shards_of_one_rank_is_named_and_its_update_skipped(outcomes):
    nan = outcomes["nan"]
    [alarm] = nan.of_kind("alarm")
    assert (alarm["detector"], alarm["step"], alarm["where"]["rank"]) == ("not_finite", START, 1)
    assert [step for step, act in zip(nan.column("step"), nan.column("act"), strict=True) if act == "skip"] == [START]
    assert all(loss == loss for loss in nan.column("total_loss"))
    assert alarm["text"].endswith("of the parameters that rank 1 holds, the gradients of 1 are NaN or infinite")
    log = (nan.folder / "logs" / "rank-00000.log").read_text()
    assert "first: layers.1.attention.o_proj.weight, held by rank 1" in log


def test_a_slow_rank_is_named(outcomes):
    [alarm] = outcomes["slow"].of_kind("alarm")
    assert (alarm["detector"], alarm["where"]["rank"]) == ("straggler", 1)
    assert 25 < alarm["step"] <= 25 + 15


def test_clip_limits_the_sick_layer_from_the_next_step_on_and_in_a_resumed_run(corpus, tmp_path):
    limit, limits = 0.02, {}
    recipe = faulty_recipe(corpus, tmp_path / "clip", 30, replace(acts(blow_up="clip"), limit=limit))
    grow = explode(10)

    def grow_and_note(network, step):
        grow(network, step)
        limits[step] = {n: moe.experts.limit for n, moe in network.moe_layers().items()}

    run(recipe, grow_and_note, None, None)
    [clip] = [event for event in ledger(tmp_path / "clip") if event["event"] == "decision"]
    assert (clip["act"], clip["clip_layers"]) == ("clip", [LAYER])
    stage = replace(recipe.stages["only"], tokens=40 * 16 * 32, limits=LimitsConfig(routed={LAYER: 2 * limit}))
    with planted(grow_and_note):
        resume(replace(recipe, stages={"only": stage}), tmp_path / "clip")
    assert limits == {step: {1: None, LAYER: None if step <= clip["step"] else limit} for step in range(1, 41)}
    cut = connect(tmp_path / "clip" / "metrics").execute(
        "SELECT DISTINCT step FROM layer_expert WHERE clipped_sum > 0 AND layer = 2 ORDER BY 1"
    )
    assert [step for (step,) in cut.fetchall()] == list(range(clip["step"] + 1, 41)), (
        "activations are cut, and only then"
    )


@pytest.mark.parametrize("name", ["explode", "poison", "skip", "nan", "slow", "router, 1 rank"])
def test_what_was_decided_can_be_replayed_from_the_run_folder(outcomes, name, capsys):
    assert replay(outcomes[name].folder) == 0, capsys.readouterr().out
