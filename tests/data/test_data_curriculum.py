from steptron.config.schema import LrConfig, RampStep, StageConfig
from steptron.data.curriculum import batch_size_at


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
