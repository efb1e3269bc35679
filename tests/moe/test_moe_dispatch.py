"""Dispatch: the layout of the rows against the definition, and the local dispatcher."""

import pytest
import torch

from steptron.moe.dispatch import ROW_MULTIPLE, LocalDispatcher, count_tokens, plan_rows


def routing(kind: str, num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    torch.manual_seed(0)
    if kind == "one-expert":
        return torch.full((num_tokens, 1), num_experts - 2)
    if kind == "few":
        return torch.rand(num_tokens, 3).argsort(1)[:, :top_k] + 1
    return torch.rand(num_tokens, num_experts).argsort(1)[:, :top_k]


KINDS = pytest.mark.parametrize("kind", ["spread", "few", "one-expert"])


@KINDS
def test_counts(kind: str):
    experts = routing(kind, 37, 9, 2)
    assert count_tokens(experts, 9).tolist() == [(experts == e).sum().item() for e in range(9)]


@KINDS
def test_rows_lie_in_groups_in_token_order(kind: str):
    experts = routing(kind, 37, 9, 2)
    plan = plan_rows(experts, 9)
    start = 0
    for e, size in enumerate(plan.groups_E.tolist()):
        tokens = [n for n in range(37) if e in experts[n].tolist()]
        assert plan.source_P[start : start + len(tokens)].tolist() == tokens
        assert (plan.source_P[start + len(tokens) : start + size] == 0).all()
        assert size % ROW_MULTIPLE == 0
        assert 0 <= size - len(tokens) < ROW_MULTIPLE
        start += size
    assert start == plan.source_P.shape[0]


@KINDS
def test_slots_lead_back_to_the_token(kind: str):
    experts = routing(kind, 37, 9, 2)
    plan = plan_rows(experts, 9)
    ends = plan.groups_E.cumsum(0)
    assert plan.slots_NK.unique().numel() == experts.numel()
    for n in range(37):
        for k, slot in enumerate(plan.slots_NK[n]):
            assert plan.source_P[slot] == n
            assert torch.searchsorted(ends, slot, right=True) == experts[n, k]


def test_experts_beyond_16_bits_sort_too():
    experts = torch.tensor([[40_000, 3], [3, 69_999]])
    plan = plan_rows(experts, 70_000)
    assert plan.slots_NK.tolist() == [[16, 0], [1, 32]]


def test_local_dispatch_moves_nothing():
    x, experts, weights = torch.randn(4, 8), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    dispatcher = LocalDispatcher()
    here = dispatcher.dispatch(x, experts, weights)
    assert here.x_ND is x
    assert dispatcher.combine(here.x_ND, here.way_back) is x
