"""The rows that a rank reads, when it reads them, and what the schedules say of a step, are compared with lists by hand."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from steptron.config.schema import BalanceConfig, LrConfig
from steptron.data.loader import Batch
from steptron.model.inputs import Inputs, Rows
from steptron.train import loop
from steptron.train.batch import Preparer, row_ranges, step_settings

from tiny import tiny_model, tiny_stage
from waiting import wait_until

ALONE: Any = SimpleNamespace(
    dense={"cp": SimpleNamespace(size=lambda: 1, get_local_rank=lambda: 0)}, layout=SimpleNamespace(data_ranks=2)
)
"""The meshes of one of two data-parallel ranks."""


def batch_of(count: int) -> Batch:
    tokens = torch.arange(count * 9).view(count, 9)
    return Batch(Rows.unweighted(tokens, torch.zeros(count, 9, dtype=torch.int32)), ("b", "a")[:count])


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


def test_prepared_inputs_are_those_of_the_rows_for_the_trained_heads():
    batch = batch_of(2)
    prepared = Preparer(6, ALONE, torch.device("cpu"), sources=["a", "b"], mtp_heads=1)(batch)
    wanted = Inputs.from_rows(batch.rows.cut(8), 6, sources=[1, 0])
    assert prepared.batch.rows.tokens_BS.shape == (2, 8)
    pairs = zip(prepared.inputs().tensors(), wanted.tensors(), strict=True)
    assert all(torch.equal(got, want) for got, want in pairs)


def test_batches_of_the_next_step_are_prepared_while_a_step_runs(monkeypatch: pytest.MonkeyPatch):
    stage = tiny_stage(seq_len=6, batch_size=20, micro_batch=2)
    asked: list[range] = []

    def read(name: str, indices: range) -> Batch:
        asked.append(indices)
        return batch_of(2)

    run: Any = SimpleNamespace(
        recipe=SimpleNamespace(model=tiny_model(), stages={"only": stage}),
        meshes=ALONE,
        network=SimpleNamespace(device=torch.device("cpu")),
        loader=SimpleNamespace(sources=["a", "b"], batch=read),
    )
    requests = (("only", range(n, n + 2)) for n in range(0, 1000, 2))
    monkeypatch.setattr(loop, "_micro_batches", lambda run, counters: requests)
    with loop._prefetched(run, SimpleNamespace(stage="only")) as prefetcher:  # pyright: ignore[reportArgumentType]
        ready = iter(prefetcher)
        for step in (1, 2):
            wait_until(lambda step=step: len(asked) >= 5 * step)
            for _ in range(5):
                next(ready)
