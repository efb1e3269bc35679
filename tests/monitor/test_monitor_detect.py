"""Planted faults are seen in time and named, once; noise of small runs is not."""

import json
import math

import numpy as np
import pytest
from steptron.config.detectors import DetectorsConfig
from steptron.monitor.detect import Detectors
from steptron.monitor.statistics.registry import Registry
from vital_traces import Trace, Values, alarms

START = 400
SECOND = pytest.param(1, marks=pytest.mark.long)
"""Another trace, for `make chaos`."""


def _busy(values: Values, rank: int, factor: float) -> None:
    """The rank takes longer, the others wait for it."""
    busy_R = values["step_time"] - values["communication_time"]
    busy_R[rank] *= factor
    values["step_time"] = np.full_like(busy_R, busy_R.max() + 0.02)
    values["communication_time"] = values["step_time"] - busy_R


def _slow(rank: int, factor: float):
    def fault(step: int, values: Values) -> None:
        if step >= START:
            _busy(values, rank, factor)

    return fault


def _stalled(step: int, values: Values) -> None:
    if step >= START:
        values["data_wait"][1] = 0.6 * values["step_time"][1]


def _blown_up(step: int, values: Values) -> None:
    """One expert of a late layer explodes, invisible in the loss."""
    if step >= START:
        values["out_norm_sum"][2, 5] = (
            12 * np.median(values["out_norm_sum"][2] / values["rows"][2]) * values["rows"][2, 5]
        )
        values["h_square_sum"][2, 5] *= 12
        values["weight_square_sum"][2, 5] *= 9


def _creeping(step: int, values: Values) -> None:
    """As the paper tells: slowly, over hundreds of steps."""
    factor = math.exp(max(0, step - START) / 400)
    values["out_norm_sum"][1, 3] *= factor


def _decayed(step: int, values: Values) -> None:
    """Rows of one expert shrink while the router sends tokens as before: h falls with the square of the weights."""
    if step >= START:
        factor = 0.25 ** (step - START + 1)
        values["weight_square_sum"][1, 7] *= factor
        values["h_square_sum"][1, 7] *= factor**2
        values["out_norm_sum"][1, 7] *= factor**1.5


def _quiet_activations(step: int, values: Values) -> None:
    """Activations alone, at a fifteenth of the median; weights are as they were."""
    if step >= START:
        rms_E = np.sqrt(values["h_square_sum"][0] / values["elements"][0])
        values["h_square_sum"][0, 2] = values["elements"][0, 2] * (np.median(rms_E) / 15) ** 2


def _light_weights(step: int, values: Values) -> None:
    """Weights alone: a fifth of what they were."""
    if step >= START:
        values["weight_square_sum"][0, 2] *= 0.04


def _starved(step: int, values: Values) -> None:
    if step >= START:
        for name in ("tokens", "rows", "elements", "h_square_sum", "out_norm_sum"):
            values[name][1, 4] = 0.0


def _collapsed(step: int, values: Values) -> None:
    """All tokens of a layer go to its first two experts."""
    if step >= START:
        tokens_E = values["tokens"][2]
        total = tokens_E.sum()
        tokens_E[:] = 0.5
        tokens_E[:2] = (total - 7) / 2


def _sure(step: int, values: Values) -> None:
    """A router that gives all of the probability to one expert a token."""
    if step >= START:
        values["entropy_sum"][0] = 0.05 * math.log(16) * values["router_tokens"][0]


def _crowded(step: int, values: Values) -> None:
    """The second half of the experts, on one rank of two, draws four fifths of all tokens."""
    if step >= START:
        tokens_LE, total = values["tokens"], values["tokens"].sum()
        for half, share in ((slice(0, 8), 0.2), (slice(8, 16), 0.8)):
            tokens_LE[:, half] *= share * total / tokens_LE[:, half].sum()


def _poisoned(change: float):
    def fault(step: int, values: Values) -> None:
        if step == START:
            values["loss"] += change

    return fault


def _steep(factor: float):
    def fault(step: int, values: Values) -> None:
        if step == START:
            values["grad_norm"] *= factor

    return fault


def _nan_gradient(step: int, values: Values) -> None:
    if step == START:
        values["grad_norm"] = math.nan
        values["not_finite"][3] = 12


def _nan_loss(step: int, values: Values) -> None:
    """The forward pass of one layer breaks: everything behind it is NaN, too, the sums over experts among it."""
    if step == START:
        values["loss"] = values["total_loss"] = values["grad_norm"] = math.nan
        values["not_finite"][:] = 40
        for name in ("entropy_sum", "h_square_sum", "out_norm_sum"):
            values[name][2] = math.nan


def _nan_term(step: int, values: Values) -> None:
    """A term that no gradient comes from, as the loss of MTP heads of weight 0."""
    if step == START:
        values["total_loss"] = math.nan


FAULTS = {
    "loss up": (_poisoned(1.05), "loss_spike", {"side": "up"}, 0),
    "loss down": (_poisoned(-1.05), "loss_spike", {"side": "down"}, 0),
    "gradient norm up": (_steep(25.0), "grad_norm_spike", {"side": "up"}, 0),
    "gradient norm down": (_steep(0.01), "grad_norm_spike", {"side": "down"}, 0),
    "NaN gradient": (_nan_gradient, "not_finite", {"rank": 3, "of": "grad_norm"}, 0),
    "NaN everywhere": (_nan_loss, "not_finite", {"rank": 0, "more": 3, "of": "loss total_loss grad_norm"}, 0),
    "NaN in a term": (_nan_term, "not_finite", {"of": "total_loss"}, 0),
    "blow-up": (_blown_up, "blow_up", {"layer": 3, "expert": 5}, 5),
    "creeping blow-up": (_creeping, "blow_up", {"layer": 2, "expert": 3}, 1200),
    "death": (_decayed, "expert_death", {"layer": 2, "expert": 7}, 10),
    "death of activations": (_quiet_activations, "expert_death", {"layer": 1, "expert": 2, "of": "activation_rms"}, 10),
    "death of weights": (_light_weights, "expert_death", {"layer": 1, "expert": 2, "of": "weight_norm"}, 10),
    "starved": (_starved, "idle_expert", {"layer": 2, "expert": 4}, 20),
    "collapse of load": (_collapsed, "router_collapse", {"layer": 3, "of": "concentration"}, 20),
    "collapse of entropy": (_sure, "router_collapse", {"layer": 1, "of": "entropy"}, 20),
    "overload": (_crowded, "rank_overload", {"ep_rank": 1}, 25),
    "straggler": (_slow(2, 2.0), "straggler", {"rank": 2}, 10),
    "data stall": (_stalled, "data_stall", {"rank": 1}, 12),
}


@pytest.mark.parametrize(("fault", "detector", "where", "within"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("seed", [0, SECOND])
def test_a_planted_fault_is_seen_in_time_named_and_told_once(seed, fault, detector, where, within):
    trace = Trace(seed)
    found = alarms(trace, Detectors(DetectorsConfig(), trace.around), START + within + 30, fault)
    raised = [alarm for alarm in found if alarm.new]
    # A router that sends all tokens to two experts does starve the others.
    also = {"idle_expert"} if fault is _collapsed else set()
    assert {alarm.detector for alarm in raised} - also == {detector}
    (alarm,) = (alarm for alarm in raised if alarm.detector == detector)
    assert START <= alarm.step <= START + within, f"raised at {alarm.step}"
    assert START <= alarm.since <= alarm.step
    assert where.items() <= alarm.where.items(), alarm.where
    assert json.loads(json.dumps(alarm.evidence()))["text"] == alarm.text


@pytest.mark.parametrize("change", [1.2, -1.2], ids=["up", "down"])
@pytest.mark.parametrize("seed", range(4))
def test_a_poisoned_batch_is_seen_while_losses_fall_fast(seed, change):
    """Step 70, where the loss falls by 0.03 nats a step, and the window of 128 steps is half empty."""
    trace = Trace(seed)

    def poison(step: int, values: Values) -> None:
        values["loss"] += change if step == 70 else 0.0

    found = alarms(trace, Detectors(DetectorsConfig(), trace.around), 90, poison)
    assert [(a.detector, a.step, a.phase, a.count) for a in found] == [
        ("loss_spike", 70, "raised", 1),
        ("loss_spike", 73, "cleared", 1),
    ]


def test_an_expert_that_dies_is_told_with_what_is_low_of_it():
    trace = Trace()
    found = alarms(trace, Detectors(DetectorsConfig(), trace.around), START + 12, _decayed)
    (alarm,) = (alarm for alarm in found if alarm.new)
    assert alarm.where["of"] == "activation_rms weight_norm"
    assert alarm.value < alarm.threshold


def test_of_two_ranks_the_slow_one_is_named():
    trace = Trace(world_size=2, jitter=0.2)
    found = alarms(trace, Detectors(DetectorsConfig(), trace.around), START + 10, _slow(1, 2.0))
    assert [(alarm.detector, alarm.where) for alarm in found if alarm.new] == [("straggler", {"rank": 1})]


def test_milliseconds_are_no_straggler():
    trace = Trace()

    def short(step: int, values: Values) -> None:
        _slow(2, 3.0)(step, values)
        for name in ("step_time", "communication_time", "data_wait"):
            values[name] = values[name] * 0.05

    assert not alarms(trace, Detectors(DetectorsConfig(), trace.around), START + 100, short)


@pytest.mark.parametrize(
    ("fault", "detector"),
    [(_starved, "idle_expert"), (_collapsed, "router_collapse"), (_crowded, "rank_overload")],
    ids=["idle", "collapse", "overload"],
)
def test_routers_may_find_their_way_in_the_first_steps(fault, detector):
    """What would be an alarm later is none up to step 200, and the steps there do not count."""
    trace = Trace()
    found = alarms(trace, Detectors(DetectorsConfig(), trace.around), 215, lambda step, values: fault(START, values))
    steps = [alarm.step for alarm in found if alarm.detector == detector]
    assert all(step >= 210 for step in steps), steps


QUIET = {
    "4 ranks": {},
    "2 ranks": {"world_size": 2, "num_experts": 8},
    "much jitter": {"jitter": 0.35},
    "no MoE statistics": {"level": "off"},
    "batches of one document": {"stages": (("base", 60), ("long", 500), ("longer", 10**9))},
}


@pytest.mark.parametrize("seed", [0, SECOND])
@pytest.mark.parametrize("kind", QUIET)
def test_2000_quiet_steps_raise_nothing(seed, kind):
    """Warm-up, falling losses, changes of stage, hiccups at checkpoints and a resume in the middle."""
    trace = Trace(seed + 100, **QUIET[kind])
    random = np.random.default_rng(seed)
    detectors = Detectors(DetectorsConfig(), trace.around)
    found = []

    def hiccups(step: int, values: Values) -> None:
        if step % 50 == 1 and step > 1:  # rank 0 has written a checkpoint
            values["step_time"] = values["step_time"] + 1.5
            values["communication_time"][1:] += 1.5
        if step % 130 < 5:  # somebody else takes a core for five steps
            _busy(values, trace.around.world_size - 1, 2.5)
        if step % 400 == 7:  # a page fault of the reader
            values["data_wait"][0] = 2.0
            values["step_time"] = values["step_time"] + 2.0
        if kind == "batches of one document" and random.random() < 0.2:
            values["loss"] += 1.2  # code among prose
        if step == 1001:  # resumed: times of the step before are not known
            for name in ("step_time", "communication_time", "data_wait"):
                values[name] = np.zeros_like(values[name])

    for step, stage, plane in trace.steps(2000, hiccups):
        if step == 1001:
            state = json.loads(json.dumps(detectors.state()))
            detectors = Detectors(DetectorsConfig(), trace.around)
            detectors.restore(state)
        found += detectors.observe(step, stage, trace.registry, plane)
    assert [(alarm.step, alarm.text) for alarm in found] == []


@pytest.mark.parametrize("seed", range(6))
def test_flat_then_falling_losses_are_no_spike(seed):
    """A learning rate that warms up: nothing for 60 steps, with little noise, then two nats in 40 steps."""
    trace = Trace(seed)
    random = np.random.default_rng(seed)

    def fall(step: int, values: Values) -> None:
        values["loss"] = 8.3 - 0.05 * min(40, max(0, step - 60)) + random.normal(0, 0.01)

    assert not alarms(trace, Detectors(DetectorsConfig(), trace.around), 250, fall)


def test_a_detector_without_its_statistics_is_not_active():
    trace = Trace(level="off")
    registry = Registry()
    for name in ("loss", "total_loss", "grad_norm"):
        registry.add(name, unit="1", reduction="sum", axes={}, vital=True)
    detectors = Detectors(DetectorsConfig(), trace.around)
    for step in range(1, 40):
        assert not detectors.observe(step, "base", registry, np.array([2.0, 2.1, 1.0], dtype=np.float32))
    (alarm,) = detectors.observe(40, "base", registry, np.array([9.0, 9.1, 1.0], dtype=np.float32))
    assert alarm.detector == "loss_spike"
