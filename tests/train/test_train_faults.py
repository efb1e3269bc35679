"""Faults planted in real runs: each is seen within the steps that it may take, is named, and nothing else is raised."""

import os
import re
from dataclasses import replace

import pytest
from faulty_runs import (
    BATCH,
    EXPERT,
    LAYER,
    SEQ,
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
from steptron.config.schema import ExpertMeshConfig, LimitsConfig, ParallelConfig, Recipe
from steptron.monitor.detect.replay import replay
from steptron.monitor.storage.store import connect

from small_runs import ledger

pytestmark = pytest.mark.takes(60)

START = 31
"""The first step with a fault in the runs that continue the healthy one."""
QUIET_STEPS = int(os.environ.get("STEPTRON_QUIET_STEPS", "90"))
"""`make chaos` makes 2,000 of them."""
WARM_UP = min(200, 2 * QUIET_STEPS // 3)
"""Steps before loads are judged; 200 is the default."""
SICK = {  # by fault: detector, first step, and steps that it may take
    "explode": ("blow_up", START, 10),
    "decay": ("expert_death", START, 15),
    "starve": ("idle_expert", QUIET_STEPS + 1, 20),
}
POISONED = 33
POISON = range((POISONED - 1) * BATCH, POISONED * BATCH)
"""What this step reads."""
NAN, SLOW, ROUTER = 12, 25, 42
"""When two ranks meet one fault after another in one run."""


def judged_early(recipe: Recipe) -> Recipe:
    """The recipe whose loads are judged after `WARM_UP` steps."""
    names = ("idle_expert", "router_collapse", "rank_overload")
    detectors = recipe.monitor.detectors
    early = {name: replace(getattr(detectors, name), warm_up=WARM_UP) for name in names}
    return replace(recipe, monitor=replace(recipe.monitor, detectors=replace(detectors, **early)))


@pytest.fixture(scope="module")
def outcomes(corpus, tmp_path_factory) -> dict[str, Outcome]:
    """All runs. Those of one rank continue copies of a healthy one; those of two ranks meet their faults in turn."""
    folder = tmp_path_factory.mktemp("faults")

    def job(name: str, steps: int, policy=None, ranks: int = 1, **more) -> FaultyJob:
        return FaultyJob(recipe=faulty_recipe(corpus, folder / name, steps, policy, ranks), **more)

    healthy = job("healthy", 60, faults=(("stop", {"at": START - 2}),))
    sick = {
        fault: job(fault, START + within + 5, base=healthy.folder, faults=((fault, {"start": start}),))
        for fault, (_, start, within) in SICK.items()
        if start == START
    }
    router = job("router 1", 40, base=healthy.folder, faults=(("break_router", {"at": 35, "rank": 0}),))
    bad = {
        "router, 1 rank": replace(router, then=router.recipe),
        "poison": job("poison", POISONED + 3, base=healthy.folder, poison=POISON),
        "skip": job("skip", POISONED + 3, acts(loss_spike="skip"), base=healthy.folder, poison=POISON),
    }
    starve = ("starve", {"start": QUIET_STEPS + 1})
    quiet = job("quiet", QUIET_STEPS + SICK["starve"][2], ranks=2, faults=(starve,))
    experts_apart = ParallelConfig(expert=ExpertMeshConfig(ep=2))
    quiet = replace(quiet, recipe=replace(judged_early(quiet.recipe), parallel=experts_apart))
    slow = ("slow", {"start": SLOW, "rank": 1, "seconds": 0.3})
    two = {
        "2 ranks": job(
            *("2", 45),
            ranks=2,
            faults=(slow, ("break_router", {"at": ROUTER, "rank": 1})),
            after_backward=("not_a_number", {"at": NAN, "rank": 1}),
        ),
    }
    found = run_groups((1, {"healthy": healthy}), (2, two | {"quiet": quiet}))
    found |= run_groups((1, bad | sick))
    return found | {"starve": found["quiet"]}


@pytest.mark.parametrize(
    ("name", "at", "newest"), [("router, 1 rank", 35, "step-00000040"), ("2 ranks", ROUTER, "step-00000040")]
)
def test_a_router_that_is_not_finite_stops_the_run_and_saves_nothing(outcomes, name, at, newest):
    broken = outcomes[name]
    said = re.match(
        rf"RouterError 3: step {at}: router logits of layer 1 are NaN or infinite on rank (\d); nothing was saved",
        broken.error,
    )
    assert said
    assert int(said[1]) == 0, "the shard is gathered: every rank's router is broken, the first is named"
    assert sum("router logits of layer 1" in end.get("reason", "") for end in broken.of_kind("run_end")) == 1
    assert sorted(path.name for path in (broken.folder / "checkpoints").glob("step-*"))[-1] == newest


def test_after_a_broken_router_the_run_goes_on_from_its_checkpoint(outcomes):
    broken = outcomes["router, 1 rank"]
    assert broken.of_kind("resume")[-1]["checkpoint"] == "step-00000030"
    assert broken.of_kind("decision")[0]["judged"] == "judged/step-00000035.npz"
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
    assert {alarm["step"] for alarm in raised} == {POISONED}
    assert "loss_spike" in {alarm["detector"] for alarm in raised} <= {"loss_spike", "grad_norm_spike"}


def test_a_skipped_step_leaves_weights_alone_and_is_marked(outcomes):
    skip = outcomes["skip"]
    [decision] = skip.of_kind("decision")
    assert (decision["step"], decision["act"]) == (POISONED, "skip")
    assert [step for step, act in zip(skip.column("step"), skip.column("act"), strict=True) if act == "skip"] == [
        POISONED
    ]
    loss = skip.column("total_loss")
    before, at, after = range(POISONED - 2, POISONED + 1)
    assert loss[at] > loss[before] + 0.7
    assert loss[after] < loss[before] + 0.3
    assert loss[after] != outcomes["poison"].column("total_loss")[after], "there the update was made"


def test_quiet_steps_raise_nothing(outcomes):
    """On two ranks with experts of their own, of which one could be slow or overloaded."""
    around = outcomes["quiet"].of_kind("detectors")[0]["around"]
    assert (around["world_size"], around["ep"]) == (2, 2)
    assert [alarm for alarm in outcomes["quiet"].of_kind("alarm") if alarm["step"] <= QUIET_STEPS] == []
    assert outcomes["quiet"].column("step") == list(range(1, QUIET_STEPS + SICK["starve"][2] + 1))


def test_a_nan_gradient_in_the_shards_of_one_rank_is_named_and_its_update_skipped(outcomes):
    nan = outcomes["2 ranks"]
    alarm, *later = nan.of_kind("alarm")
    assert [(each["detector"], each["step"] == ROUTER) for each in later] == [
        ("straggler", False),
        ("not_finite", True),
    ]
    assert (alarm["detector"], alarm["step"], alarm["where"]["rank"]) == ("not_finite", NAN, 1)
    assert [step for step, act in zip(nan.column("step"), nan.column("act"), strict=True) if act == "skip"] == [NAN]
    assert all(loss == loss for loss in nan.column("total_loss"))
    assert alarm["text"].endswith("of the parameters that rank 1 holds, the gradients of 1 are NaN or infinite")
    log = (nan.folder / "logs" / "rank-00000.log").read_text()
    assert "first: layers.1.attention.o_proj.weight, held by rank 1" in log


def test_a_slow_rank_is_named(outcomes):
    [alarm] = [each for each in outcomes["2 ranks"].of_kind("alarm") if each["detector"] != "not_finite"]
    assert (alarm["detector"], alarm["where"]["rank"]) == ("straggler", 1)
    assert SLOW < alarm["step"] <= SLOW + 15


def test_clip_limits_the_sick_layer_from_the_next_step_on_and_in_a_resumed_run(corpus, tmp_path):
    limit, limits = 0.02, {}
    recipe = faulty_recipe(corpus, tmp_path / "clip", 20, replace(acts(blow_up="clip"), limit=limit))
    grow = explode(10)

    def grow_and_note(network, step):
        grow(network, step)
        limits[step] = {n: moe.experts.limit for n, moe in network.moe_layers().items()}

    run(recipe, grow_and_note, None, None)
    [clip] = [event for event in ledger(tmp_path / "clip") if event["event"] == "decision"]
    assert (clip["act"], clip["clip_layers"]) == ("clip", [LAYER])
    stage = replace(recipe.stages["only"], tokens=26 * BATCH * SEQ, limits=LimitsConfig(routed={LAYER: 2 * limit}))
    with planted(grow_and_note):
        resume(replace(recipe, stages={"only": stage}), tmp_path / "clip")
    assert limits == {step: {1: None, LAYER: None if step <= clip["step"] else limit} for step in range(1, 27)}
    cut = connect(tmp_path / "clip" / "metrics").execute(
        "SELECT DISTINCT step FROM layer_expert WHERE clipped_sum > 0 AND layer = 2 ORDER BY 1"
    )
    assert [step for (step,) in cut.fetchall()] == list(range(clip["step"] + 1, 27)), (
        "activations are cut, and only then"
    )


@pytest.mark.parametrize("name", ["explode", "poison", "skip", "2 ranks", "router, 1 rank"])
def test_what_was_decided_can_be_replayed_from_the_run_folder(outcomes, name, capsys):
    assert replay(outcomes[name].folder) == 0, capsys.readouterr().out
