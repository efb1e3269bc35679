"""The plan of a run: batch sizes of a ramp, and samples that a rewound run leaves out."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from steptron.config.schema import LrConfig, RampStep, StageConfig
from steptron.data.curriculum import Window, batch_size_at, coming_steps, last_step, num_steps, samples_of_steps

from tiny import tiny_stage

T = 8
STAGES = {
    "base": tiny_stage(
        seq_len=T, batch_size=6, micro_batch=1, tokens=20 * 6 * T, ramp=(RampStep(until=5 * 2 * T, batch_size=2),)
    ),
    "long": tiny_stage(seq_len=2 * T, batch_size=3, micro_batch=1, tokens=7 * 3 * 2 * T),
}


@dataclass(frozen=True)
class At:
    """A place in the curriculum; without values, its beginning."""

    step: int = 0
    stage: str = ""
    stage_tokens: int = 0
    stage_samples: int = 0


def stage(tokens: int, seq_len: int, batch_size: int, ramp: tuple[tuple[int, int], ...] = ()) -> StageConfig:
    return StageConfig(
        tokens=tokens,
        seq_len=seq_len,
        batch_size=batch_size,
        ramp=tuple(RampStep(until=until, batch_size=size) for until, size in ramp),
        mix={"code": 1.0},
        lr=LrConfig(peak=1e-3),
    )


def test_a_ramp_step_ends_at_its_very_token() -> None:
    config = stage(1000, 10, 8, ((40, 2), (120, 4)))
    assert [batch_size_at(config, tokens) for tokens in (0, 39, 40, 119, 120, 999)] == [2, 2, 4, 4, 8, 8]


def test_without_a_ramp_every_batch_is_full() -> None:
    assert {batch_size_at(stage(1000, 10, 8), tokens) for tokens in (0, 1, 999)} == {8}


@given(
    st.integers(1, 2000),
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(1, 2500), st.integers(1, 9)), max_size=3).map(lambda ramp: tuple(sorted(ramp))),
)
def test_steps_are_counted_as_they_are_planned(
    tokens: int, seq_len: int, batch_size: int, ramp: tuple[tuple[int, int], ...]
) -> None:
    stages = {"a": stage(tokens, seq_len, batch_size, ramp), "b": STAGES["long"]}
    plans = list(coming_steps(stages, At(), []))
    assert num_steps(stages["a"]) == sum(plan.stage == "a" for plan in plans)
    assert last_step(stages, At()) == len(plans)
    done = 0
    for number, plan in enumerate(plans, 1):
        if plan.stage == "a":
            done += len(plan.samples) * seq_len
            assert last_step(stages, At(number, "a", done)) == len(plans)


def test_without_windows_every_sample_is_read_once_in_order() -> None:
    plans = list(coming_steps(STAGES, At(), []))
    assert [plan.step for plan in plans] == list(range(1, len(plans) + 1))
    for name in STAGES:
        samples = [n for plan in plans if plan.stage == name for n in plan.samples]
        assert samples == list(range(len(samples)))
        assert 0 <= len(samples) * STAGES[name].seq_len - STAGES[name].tokens < 6 * T


@given(st.lists(st.tuples(st.sampled_from(list(STAGES)), st.integers(0, 140), st.integers(1, 30)), max_size=4))
@settings(max_examples=60, deadline=None)
def test_no_sample_of_a_window_is_read_and_the_budget_stays(windows: list[tuple[str, int, int]]) -> None:
    left_out = [Window(stage, first, first + length) for stage, first, length in windows]
    plans = list(coming_steps(STAGES, At(), left_out))
    assert [plan[:2] for plan in plans] == [plan[:2] for plan in coming_steps(STAGES, At(), [])]
    for name in STAGES:
        samples = [n for plan in plans if plan.stage == name for n in plan.samples]
        assert samples == sorted(set(samples)), "in order, none twice"
        for window in left_out:
            assert window.stage != name or not set(samples) & set(range(window.first, window.stop))


def test_the_window_of_bad_steps_is_what_they_read_and_joins_neighbours() -> None:
    plans = {plan.step: plan for plan in coming_steps(STAGES, At(), [])}
    assert samples_of_steps(STAGES, At(), [], range(4, 6)) == [
        Window("base", plans[4].samples.start, plans[5].samples.stop)
    ]
    last = max(step for step, plan in plans.items() if plan.stage == "base")
    across = samples_of_steps(STAGES, At(), [], range(last, last + 2))
    assert across == [
        Window(plan.stage, plan.samples.start, plan.samples.stop) for plan in (plans[last], plans[last + 1])
    ]


def test_a_second_rewind_counts_from_what_the_first_left() -> None:
    first = samples_of_steps(STAGES, At(), [], range(3, 5))
    second = samples_of_steps(STAGES, At(), first, range(3, 5))
    assert second[0].first == first[0].stop
    plans = coming_steps(STAGES, At(), [*first, *second])
    samples = [n for plan in plans if plan.stage == "base" for n in plan.samples]
    assert not set(samples) & set(range(first[0].first, second[0].stop))
