from hypothesis import given
from hypothesis import strategies as st

from steptron.config.schema import LrConfig, RampStep, StageConfig
from steptron.data.curriculum import batch_size_at, plan_steps, step_at


def stage(tokens: int, seq_len: int, batch_size: int, ramp: tuple[tuple[int, int], ...] = ()) -> StageConfig:
    return StageConfig(
        tokens=tokens,
        seq_len=seq_len,
        batch_size=batch_size,
        ramp=tuple(RampStep(until=until, batch_size=size) for until, size in ramp),
        mix={"code": 1.0},
        lr=LrConfig(peak=1e-3),
    )


@given(
    tokens=st.integers(1, 20_000),
    seq_len=st.integers(1, 64),
    batch_size=st.integers(1, 32),
    ramp=st.lists(st.tuples(st.integers(1, 25_000), st.integers(1, 32)), max_size=4).map(lambda r: tuple(sorted(r))),
)
def test_steps_are_those_of_a_loop_that_counts_tokens(tokens, seq_len, batch_size, ramp) -> None:
    config = stage(tokens, seq_len, batch_size, ramp)
    done, samples, steps = 0, 0, []
    while done < tokens:
        size = next((size for until, size in ramp if done < until), batch_size)
        assert batch_size_at(config, done) == size
        steps.append((samples, size, done))
        samples, done = samples + size, done + size * seq_len
    assert plan_steps(config) == len(steps)
    picked = range(0, len(steps), max(1, len(steps) // 50))
    assert [tuple(step_at(config, index)) for index in picked] == [steps[index] for index in picked]
    assert tuple(step_at(config, len(steps) - 1)) == steps[-1]


def test_the_published_budget_of_a_stage_is_planned_at_once() -> None:
    config = stage(17_200_000_000_000, 4096, 16_384, ((500_000_000_000, 8192),))
    last = step_at(config, plan_steps(config) - 1)
    assert last.tokens_before < config.tokens <= last.tokens_before + last.batch_size * config.seq_len
