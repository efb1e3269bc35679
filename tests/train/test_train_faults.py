"""Faults planted in real runs: each is seen within the steps that it may take, is named, and nothing else is raised."""

import os

import pytest
from faulty_runs import EXPERT, LAYER, acts, decay, explode, faulty_recipe, run, starve
from small_runs import column, metrics

QUIET_STEPS = int(os.environ.get("STEPTRON_QUIET_STEPS", "300"))
"""`make chaos` makes 2,000 of them."""


def alarms(events: list[dict]) -> list[dict]:
    return [event for event in events if event["event"] == "alarm"]


@pytest.mark.parametrize(
    ("fault", "steps", "start", "detector", "within"),
    [
        (explode, 80, 50, "blow_up", 10),
        (decay, 90, 50, "expert_death", 15),
        (starve, 250, 215, "idle_expert", 20),
    ],
    ids=["an expert's output explodes", "an expert dies while it gets its tokens", "a bias starves an expert"],
)
def test_a_sick_expert_is_seen_and_named(corpus, tmp_path, fault, steps, start, detector, within):
    events = run(faulty_recipe(corpus, tmp_path / "run", steps), fault(start))
    [alarm] = alarms(events)
    assert alarm["detector"] == detector
    assert start <= alarm["step"] <= start + within
    assert (alarm["where"]["layer"], alarm["where"]["expert"]) == (LAYER, EXPERT)


def test_a_poisoned_batch_is_seen_at_that_very_step(corpus, tmp_path):
    events = run(faulty_recipe(corpus, tmp_path / "run", 80), poison=range(60 * 16, 61 * 16))
    raised = alarms(events)
    assert {alarm["step"] for alarm in raised} == {61}
    assert "loss_spike" in {alarm["detector"] for alarm in raised}
    assert {alarm["detector"] for alarm in raised} <= {"loss_spike", "grad_norm_spike"}


def test_a_skipped_step_leaves_weights_alone_and_is_marked(corpus, tmp_path):
    policy = acts(loss_spike="skip")
    events = run(faulty_recipe(corpus, tmp_path / "run", 70, policy), poison=range(60 * 16, 61 * 16))
    [decision] = [event for event in events if event["event"] == "decision"]
    assert (decision["step"], decision["act"]) == (61, "skip")
    assert [row["step"] for row in metrics(tmp_path / "run") if row["act"] == "skip"] == [61]
    loss = column(tmp_path / "run", "loss")
    assert loss[60] > loss[59] + 0.7
    assert loss[61] < loss[59] + 0.3


def test_quiet_steps_raise_nothing(corpus, tmp_path):
    events = run(faulty_recipe(corpus, tmp_path / "run", QUIET_STEPS))
    assert alarms(events) == []
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, QUIET_STEPS + 1))
