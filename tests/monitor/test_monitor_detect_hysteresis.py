"""Hysteresis, states in checkpoints, and that nothing but the planes counts."""

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steptron.config.detectors import BlowUpConfig, DetectorsConfig, LossSpikeConfig, StragglerConfig
from steptron.monitor.detect import Detectors
from steptron.monitor.detect.hysteresis import Hysteresis, pack, unpack
from steptron.monitor.detect.spikes import usual
from vital_traces import Trace, Values, alarms


def _by_hand(steps: int, clear_steps: int, states: list[str]) -> list[str]:
    """One cell, written as a person would: "bad", "clean", "between" or "unknown" by step → what is said."""
    up, bad_run, clean_run, said = False, 0, 0, []
    for state in states:
        event = ""
        if state == "unknown":
            said.append(event)
            continue
        if up:
            clean_run = clean_run + 1 if state == "clean" else 0
            if state == "bad":
                event = "lasting"
            if clean_run == clear_steps:
                up, bad_run, event = False, 0, "cleared"
        else:
            bad_run = bad_run + 1 if state == "bad" else 0
            if bad_run == steps:
                up, clean_run, event = True, 0, "raised"
        said.append(event)
    return said


STATES = st.lists(st.sampled_from(["bad", "bad", "clean", "clean", "between", "unknown"]), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(cells=st.lists(STATES, min_size=1, max_size=4), steps=st.integers(1, 4), clear_steps=st.integers(1, 4))
def test_the_latch_does_for_many_cells_what_one_does_by_hand(cells, steps, clear_steps):
    length = min(len(states) for states in cells)
    latch = Hysteresis(len(cells), steps, clear_steps)
    said = [[""] * length for _ in cells]
    for step in range(length):
        at = np.array([states[step] for states in cells])
        change = latch.update(step, at == "bad", at == "clean", at != "unknown")
        for name in ("raised", "lasting", "cleared"):
            for cell in getattr(change, name):
                said[cell][step] = name
        latch.forget(change.cleared)
        copy = Hysteresis(len(cells), steps, clear_steps)
        copy.restore(json.loads(json.dumps(latch.state())))
        latch = copy
    assert said == [_by_hand(steps, clear_steps, states[:length]) for states in cells]


def test_the_latch_tells_the_first_bad_step_and_counts_bad_ones():
    latch = Hysteresis(1, 3, 2)
    truth = np.array([True])
    for step in (10, 11):
        latch.update(step, truth, ~truth)
    latch.update(12, ~truth, truth)  # a clean one in between: the row starts anew
    for step in (13, 14, 15, 16):
        change = latch.update(step, truth, ~truth)
    assert (int(latch.since[0]), int(latch.count[0]), list(change.lasting)) == (13, 4, [0])


def _losses(values: list[float], config: LossSpikeConfig = LossSpikeConfig()) -> list[tuple[int, str, int]]:  # noqa: B008
    """Step, phase and count of the alarms of a run with these losses after 40 quiet steps."""
    trace = Trace(level="off")
    detectors, said = Detectors(DetectorsConfig(loss_spike=config), trace.around), []
    quiet = [3.0 + 0.05 * math.sin(step) for step in range(40)]
    for step, loss in enumerate(quiet + values, start=-39):
        plane = trace.plane(trace.values(5) | {"loss": loss, "grad_norm": 1.0})
        said += [(step, a.phase, a.count) for a in detectors.observe(step, "base", trace.registry, plane)]
    return said


def test_an_alarm_is_raised_once_lasts_is_cleared_and_raised_again():
    normal, spike, between = 3.0, 6.0, 3.4
    losses = [spike, spike, normal, normal, between, spike, normal, normal, normal, normal, spike]
    assert _losses(losses) == [
        (1, "raised", 1),
        (2, "lasting", 2),
        (6, "lasting", 3),
        (9, "cleared", 3),
        (11, "raised", 1),
    ]


def test_a_level_that_stays_becomes_the_new_normal():
    said = _losses([6.0 + 0.05 * math.sin(step) for step in range(60)])
    assert said[0] == (1, "raised", 1)
    assert said[-1] == (33, "cleared", 30)
    assert _losses([6.0] * 60 + [3.0])[-1][:2] == (61, "raised")


def test_spikes_do_not_move_the_window_they_are_judged_by():
    """Every fourth step is a spike: of 200 steps in a row, the last is still one."""
    said = _losses([6.0 if step % 4 == 0 else 3.0 for step in range(200)], LossSpikeConfig(clear_steps=2))
    assert [phase for _, phase, _ in said].count("raised") == 50


def test_a_new_stage_starts_anew_and_clears_what_was_raised():
    trace = Trace(level="off")
    detectors = Detectors(DetectorsConfig(), trace.around)
    said = []
    for step in range(1, 90):
        stage, loss = ("base", 3.0) if step < 45 else ("long", 1.0)
        plane = trace.plane(trace.values(5) | {"loss": 6.0 if step == 44 else loss, "grad_norm": 1.0})
        said += [(step, a.phase) for a in detectors.observe(step, stage, trace.registry, plane)]
    assert said == [(44, "raised"), (45, "cleared")]


def test_what_is_usual_is_what_numpy_says():
    random = np.random.default_rng(0)
    for size in (20, 21, 128):
        changes = random.normal(-0.05, 0.1, size)
        by, median = usual(changes.tolist()), np.median(changes)
        assert by.median == pytest.approx(median)
        mad = 1.4826 * np.median(abs(changes - median))
        for spread, tail in ((by.spread_down, 0.02), (by.spread_up, 0.98)):
            wide = abs(np.quantile(changes, tail, method="higher" if tail > 0.5 else "lower") - median) / 2.054
            assert spread == pytest.approx(max(mad, wide))


def test_two_humped_losses_are_usual():
    """Nine steps of ten are at 2, the others at 4: the MAD is that of the first hump alone."""
    random = np.random.default_rng(0)
    losses = (np.where(random.random(600) < 0.1, 4.0, 2.0) + random.normal(0, 0.03, 600)).tolist()
    changes = [loss - 2.0 for loss in losses[:128]]
    assert 1.4826 * np.median(np.abs(changes)) < 0.1
    assert usual(changes).spread_up > 0.9
    trace = Trace(level="off")
    detectors = Detectors(DetectorsConfig(), trace.around)
    for step, loss in enumerate(losses, start=1):
        plane = trace.plane(trace.values(5) | {"loss": loss, "grad_norm": 1.0})
        assert not detectors.observe(step, "base", trace.registry, plane)


def _many_faults(step: int, values: Values) -> None:
    if step % 90 > 70:
        values["loss"] += 2.0
        values["grad_norm"] = math.nan if step % 7 == 0 else values["grad_norm"] * 20
        values["out_norm_sum"][step % 3, step % 16] *= 30
        values["weight_square_sum"][1, 7] *= 1e-4
        values["tokens"][:, 3] = 0
        values["step_time"] = values["step_time"] * 3
        values["communication_time"][1:] = values["step_time"][1:] * 0.9
        values["data_wait"][0] = values["step_time"][0]
    if step >= 166:
        values["loss"] += 4.0


@pytest.mark.parametrize("cut", [1, 130, 173, 255, 260], ids=lambda cut: f"after {cut}")
def test_a_state_in_mid_trace_goes_on_bit_by_bit(cut):
    trace = Trace(5, stages=(("base", 255), ("long", 10**9)))
    steps = [(step, stage, plane.copy()) for step, stage, plane in trace.steps(400, _many_faults)]
    whole = Detectors(DetectorsConfig(), trace.around)
    for step, stage, plane in steps[:cut]:
        whole.observe(step, stage, trace.registry, plane)
    other = Detectors(DetectorsConfig(), trace.around)
    other.restore(json.loads(json.dumps(whole.state())))
    said = 0
    for step, stage, plane in steps[cut:]:
        expected = whole.observe(step, stage, trace.registry, plane)
        assert other.observe(step, stage, trace.registry, plane) == expected
        said += len(expected)
    assert said > 100, "the trace has something to say"
    assert other.state() == whole.state()


def test_all_ranks_say_the_same_whatever_else_they_do():
    """Two ranks; one of them has judged another run before, and has a plane with statistics of its own behind the
    front."""
    trace = Trace(7)
    one, two = (Detectors(DetectorsConfig(), trace.around) for _ in range(2))
    other = Trace(8)
    stranger = Detectors(DetectorsConfig(), other.around)
    for step, stage, plane in trace.steps(300, _many_faults):
        stranger.observe(step, stage, other.registry, other.plane(other.values(step)))
        longer = np.concatenate([plane, np.full(50, np.nan, dtype=np.float32)])
        before = plane.copy()
        assert one.observe(step, stage, trace.registry, plane) == two.observe(step, stage, trace.registry, longer)
        assert np.array_equal(plane, before, equal_nan=True), "planes are read, not written"


def test_a_state_of_another_number_of_ranks_and_recipe_keeps_what_still_has_a_meaning():
    trace, fewer = Trace(1), Trace(1, world_size=2)
    detectors = Detectors(DetectorsConfig(), trace.around)
    for step, stage, plane in trace.steps(300):
        detectors.observe(step, stage, trace.registry, plane)
    changed = DetectorsConfig(straggler=StragglerConfig(window=20, slow=16), loss_spike=LossSpikeConfig(window=64))
    resumed = Detectors(changed, fewer.around)
    resumed.restore(detectors.state())
    values = fewer.values(301)
    values["loss"] += 3
    (alarm,) = resumed.observe(301, "base", fewer.registry, fewer.plane(values))
    assert alarm.detector == "loss_spike"


def test_an_array_of_another_shape_and_the_same_size_is_not_taken_for_it():
    kept = np.arange(8).reshape(2, 4)
    assert np.array_equal(unpack(pack(kept), np.zeros((2, 4), dtype=np.int64)), kept)
    assert not unpack(pack(kept), np.zeros((4, 2), dtype=np.int64)).any()


@pytest.mark.parametrize(
    ("usual_ratio", "harmless", "bad", "threshold"),
    [(4.5, 8.0, 9.9, 9.0), (7.0, 9.0, 11.5, 10.0), (2.0, 5.5, 6.5, 6.0)],
    ids=["twice the baseline", "the limit", "the ratio"],
)
def test_the_baseline_of_a_layer_that_is_always_uneven_is_its_own(usual_ratio, harmless, bad, threshold):
    trace = Trace()

    def uneven(step: int, values: Values, factor: float) -> None:
        norm_E = values["out_norm_sum"][0] / values["rows"][0]
        values["out_norm_sum"][0, 2] = factor * np.median(norm_E) * values["rows"][0, 2]

    detectors = Detectors(DetectorsConfig(), trace.around)
    said = []
    for step in range(1, 200):
        values = trace.values(200 + step)
        uneven(step, values, usual_ratio if step < 150 else (harmless if step < 160 else bad))
        said += detectors.observe(step, "base", trace.registry, trace.plane(values))
    (alarm,) = (alarm for alarm in said if alarm.new)
    assert (alarm.detector, alarm.since, alarm.step) == ("blow_up", 160, 159 + BlowUpConfig().raise_after_steps)
    assert alarm.threshold == pytest.approx(threshold, rel=0.06)


def test_many_experts_of_a_layer_share_an_alarm_that_names_the_worst():
    trace = Trace()

    def starve(step: int, values: Values) -> None:
        if step > 300:
            values["tokens"][0, 3:7] = 0.0
            values["tokens"][2, 9] = 0.0

    said = []
    detectors = Detectors(DetectorsConfig(), trace.around)
    for step, stage, plane in trace.steps(330, starve):
        said += detectors.observe(step, stage, trace.registry, plane)
    assert [alarm.where for alarm in said if alarm.new] == [
        {"layer": 1, "expert": 3, "more": 3},
        {"layer": 3, "expert": 9},
    ]


def test_an_alarm_that_lasts_is_told_of_every_layer():
    trace = Trace()
    detectors, last = Detectors(DetectorsConfig(), trace.around), []

    def explode(step: int, values: Values) -> None:
        if step > 300:
            values["out_norm_sum"][0, 5] *= 40
            values["out_norm_sum"][2, 9] *= 60

    for step, stage, plane in trace.steps(310, explode):
        last = detectors.observe(step, stage, trace.registry, plane)
    assert [(a.phase, a.where["layer"], a.where["expert"]) for a in last] == [("lasting", 1, 5), ("lasting", 3, 9)]


def _instructions(act: Callable[[], object]) -> int:
    """Bytecode instructions that Python executes in a call: what arrays do in C is none."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


def _instructions_of_steps(num_experts: int, world_size: int, troubled: bool) -> tuple[int, Detectors]:
    """What the last 3 of 20 steps of 45 layers take."""
    trace = Trace(layers=tuple(range(3, 48)), num_experts=num_experts, top_k=8, world_size=world_size, ep=8)
    detectors, counts = Detectors(DetectorsConfig(), trace.around), []
    for step in range(1, 21):
        values = trace.values(200 + step)
        if troubled:
            values["out_norm_sum"][:, step % num_experts] *= 100
            values["tokens"][:, 5] = 0
        observe = partial(detectors.observe, 400 + step, "base", trace.registry, trace.plane(values))
        if step > 17:
            counts.append(_instructions(observe))
        else:
            observe()
    return sum(counts), detectors


@pytest.mark.parametrize("troubled", [False, True], ids=["quiet", "in trouble"])
def test_a_step_takes_as_many_instructions_whatever_the_number_of_experts_and_ranks(troubled):
    """Arrays are judged as a whole: 288 experts and 64 ranks take what 16 and 8 do. benchmarks/latency.py has the
    times."""
    few, _ = _instructions_of_steps(16, 8, troubled)
    many, detectors = _instructions_of_steps(288, 64, troubled)
    assert 3_000 < many < 1.05 * few
    assert len(json.dumps(detectors.state())) < 200_000


@pytest.mark.parametrize(("rows", "raised"), [(7, False), (8, True)], ids=["too few tokens", "enough"])
def test_activations_of_few_tokens_say_nothing_of_an_expert(rows: int, raised: bool):
    """Their RMS is that of a handful of tokens, which may all be of one kind: below `min_tokens` it is not judged."""
    trace = Trace()

    def faint(step: int, values: dict) -> None:
        if step > 20:
            values["rows"][1, 4], values["elements"][1, 4] = rows, rows * 96
            values["h_square_sum"][1, 4] = rows * 96 * 1e-6

    said = alarms(trace, Detectors(DetectorsConfig(), trace.around), 40, faint)
    assert bool([a for a in said if a.detector == "expert_death" and a.where["expert"] == 4]) == raised
