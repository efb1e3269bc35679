"""Samples that a rewound run leaves out: every step from there on is what a run without them would read."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_stage

from steptron.config.schema import RampStep
from steptron.errors import CheckpointError
from steptron.train.rewind import bad_windows
from steptron.train.state import Counters, Window, coming_steps, counters_from_dict, samples_of_steps

T = 8
STAGES = {
    "base": tiny_stage(
        seq_len=T, batch_size=6, micro_batch=1, tokens=20 * 6 * T, ramp=(RampStep(until=5 * 2 * T, batch_size=2),)
    ),
    "long": tiny_stage(seq_len=2 * T, batch_size=3, micro_batch=1, tokens=7 * 3 * 2 * T),
}
NEW = Counters(data="")


def read(start: Counters, windows: list[Window]) -> list[tuple[int, str, range]]:
    """Step, stage and samples, one by one."""
    return [(counters.step + 1, *plan) for plan, counters in coming_steps(STAGES, start, windows)]


def test_without_windows_every_sample_is_read_once_in_order():
    for stage in STAGES:
        samples = [n for _, name, part in read(NEW, []) if name == stage for n in part]
        assert samples == list(range(len(samples)))
        assert len(samples) * STAGES[stage].seq_len >= STAGES[stage].tokens


@given(st.lists(st.tuples(st.sampled_from(list(STAGES)), st.integers(0, 140), st.integers(1, 30)), max_size=4))
@settings(max_examples=60, deadline=None)
def test_no_sample_of_a_window_is_read_and_the_budget_stays(windows):
    left_out = [Window(stage, first, first + length) for stage, first, length in windows]
    steps = read(NEW, left_out)
    assert [(step, stage) for step, stage, _ in steps] == [(step, stage) for step, stage, _ in read(NEW, [])]
    for stage in STAGES:
        samples = [n for _, name, part in steps if name == stage for n in part]
        assert samples == sorted(set(samples)), "in order, none twice"
        for window in left_out:
            assert window.stage != stage or not set(samples) & set(range(window.first, window.stop))


def test_the_window_of_bad_steps_is_what_they_read_and_joins_neighbours():
    steps = {step: (stage, samples) for step, stage, samples in read(NEW, [])}
    assert samples_of_steps(STAGES, NEW, [], range(4, 6)) == [Window("base", steps[4][1].start, steps[5][1].stop)]
    last = max(step for step, (stage, _) in steps.items() if stage == "base")
    across = samples_of_steps(STAGES, NEW, [], range(last, last + 2))
    assert across == [Window("base", *_ends(steps[last][1])), Window("long", *_ends(steps[last + 1][1]))]


def test_a_second_rewind_counts_from_what_the_first_left():
    first = samples_of_steps(STAGES, NEW, [], range(3, 5))
    second = samples_of_steps(STAGES, NEW, first, range(3, 5))
    assert second[0].first == first[0].stop
    samples = [n for _, stage, part in read(NEW, [*first, *second]) if stage == "base" for n in part]
    assert not set(samples) & set(range(first[0].first, second[0].stop))


def test_a_run_that_goes_on_from_a_checkpoint_reads_what_the_other_one_does():
    windows = [Window("base", 9, 15)]
    whole = list(coming_steps(STAGES, NEW, windows))
    _, middle = whole[6]
    assert list(coming_steps(STAGES, replace(middle), windows)) == whole[6:]


def _ends(samples: range) -> tuple[int, int]:
    return samples.start, samples.stop


def test_a_rewind_leaves_out_the_bad_steps_and_as_many_before_them_as_the_policy_says():
    steps = {step: (stage, samples) for step, stage, samples in read(NEW, [])}
    for before, first in ((0, 6), (2, 4), (99, 1)):
        assert bad_windows(STAGES, NEW, [], since=6, before=before, step=7) == [
            Window("base", steps[first][1].start, steps[7][1].stop)
        ]
    later = next(counters for plan, counters in coming_steps(STAGES, NEW, []) if counters.step == 5)
    (window,) = bad_windows(STAGES, later, [], since=6, before=99, step=7)
    assert window.first == steps[6][1].start, "not from before the checkpoint that it goes back to"


def test_counters_come_back_as_they_were_saved_and_others_are_refused():
    counters = Counters(data="abc", step=3, tokens=5, stage="base", tokens_by_source={"prose": 5}, watch={"policy": {}})
    saved = counters.to_dict()
    assert counters_from_dict(saved) == counters
    assert counters_from_dict({key: value for key, value in saved.items() if key != "watch"}) == replace(
        counters, watch={}
    )
    with pytest.raises(CheckpointError, match=r"missing \['step'\], unknown \[\]"):
        counters_from_dict({key: value for key, value in saved.items() if key != "step"})
    with pytest.raises(CheckpointError, match=r"missing \[\], unknown \['epoch'\]"):
        counters_from_dict(saved | {"epoch": 1})
