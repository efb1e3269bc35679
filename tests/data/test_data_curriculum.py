from hypothesis import given
from hypothesis import strategies as st

from steptron.config.schema import LrConfig, RampStep, StageConfig
from steptron.data.curriculum import batch_size_at, plan_steps


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
    done = steps = 0
    while done < tokens:
        size = next((size for until, size in ramp if done < until), batch_size)
        assert batch_size_at(config, done) == size
        steps, done = steps + 1, done + size * seq_len
    assert plan_steps(config) == steps


def test_a_ramp_step_ends_at_its_very_token() -> None:
    config = stage(1000, 10, 8, ((40, 2), (120, 4)))
    assert [batch_size_at(config, tokens) for tokens in (0, 39, 40, 119, 120, 999)] == [2, 2, 4, 4, 8, 8]
    assert plan_steps(config) == 2 + 2 + 11


def test_the_published_budget_of_a_stage_is_planned_at_once() -> None:
    config = stage(17_200_000_000_000, 4096, 16_384, ((500_000_000_000, 8192),))
    ramp = -(-500_000_000_000 // (4096 * 8192))
    assert plan_steps(config) == ramp + -(-(17_200_000_000_000 - ramp * 4096 * 8192) // (4096 * 16_384))
