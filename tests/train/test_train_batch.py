"""Which rows a rank reads, and what the schedules say of a step."""

from dataclasses import replace

import pytest
from steptron.config.schema import BalanceConfig, LrConfig
from steptron.train.batch import row_ranges, step_settings

from tiny import tiny_stage


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_every_row_is_read_by_one_rank_and_all_have_as_many(ranks: int, micro_batch: int):
    rows = 24
    by_rank = [row_ranges(100, rows, micro_batch, rank, ranks) for rank in range(ranks)]
    assert sorted(n for ranges in by_rank for indices in ranges for n in indices) == list(range(100, 100 + rows))
    assert {len(ranges) for ranges in by_rank} == {rows // micro_batch // ranks}
    assert all(len(indices) == micro_batch for ranges in by_rank for indices in ranges)


def test_schedules_are_read_at_the_last_token_of_the_step():
    """So that the first step learns, and the last one of a stage has the last value."""
    balance = BalanceConfig(bias_rate=1e-3, bias_rate_end=0.0)
    stage = tiny_stage(
        tokens=100, seq_len=10, lr=LrConfig(kind="cosine", peak=1.0, end=0.0, warmup=50), balance=balance
    )
    first, later, last = (step_settings(stage, tokens, 2, clip_norm=0.7) for tokens in (0, 30, 90))
    assert (first.lr, later.lr, last.lr) == (pytest.approx(0.4), pytest.approx(1.0), pytest.approx(0.0))
    assert first.bias_rate == pytest.approx(0.8e-3)
    assert later.bias_rate == pytest.approx(0.5e-3)
    assert last.bias_rate == 0.0, "the step that reaches over the budget is at its end"
    assert (first.seq_len, first.batch_size, first.mtp_weight, first.clip_norm) == (10, 2, stage.mtp_weight, 0.7)


def test_biases_of_a_frozen_router_do_not_move():
    stage = tiny_stage()
    assert step_settings(stage, 0, 2, clip_norm=1.0).bias_rate == stage.balance.bias_rate > 0
    frozen = replace(stage, balance=replace(stage.balance, freeze_router=True))
    assert step_settings(frozen, 0, 2, clip_norm=1.0).bias_rate == 0.0
