"""Dispatch: the layout of the rows against the definition, and the local dispatcher."""

import pytest
import torch
from choices import planned
from steptron.moe.dispatch import (
    ELSEWHERE,
    ROW_MULTIPLE,
    LocalDispatcher,
    count_tokens,
    gather_rows,
    sum_rows,
)


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
    plan = planned(experts, 9)
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
    plan = planned(experts, 9)
    ends = plan.groups_E.cumsum(0)
    assert plan.slots_NK.unique().numel() == experts.numel()
    for n in range(37):
        for k, slot in enumerate(plan.slots_NK[n]):
            assert plan.source_P[slot] == n
            assert torch.searchsorted(ends, slot, right=True) == experts[n, k]


EXACT = pytest.mark.parametrize("exact", [True, False], ids=["exact", "without-waiting"])


@KINDS
@EXACT
def test_choices_elsewhere_take_no_rows(kind: str, exact: bool):
    """The experts here are 5 to 9 of what the routing speaks of: their plan is that of the routing, cut out."""
    everything = routing(kind, 37, 9, 2)
    experts = torch.where(everything >= 4, everything - 4, ELSEWHERE)
    plan, whole = planned(experts, 5, exact), planned(everything, 9)
    assert plan.groups_E.tolist() == whole.groups_E[4:].tolist()
    start, size = int(whole.groups_E[:4].sum()), int(plan.groups_E.sum())
    assert plan.source_P[:size].tolist() == whole.source_P[start:].tolist()
    assert (plan.source_P.shape[0] > size) == (not exact or bool((experts == ELSEWHERE).any()))
    nobody = plan.source_P.shape[0] - 1
    assert plan.slots_NK.tolist() == torch.where(everything >= 4, whole.slots_NK - start, nobody).tolist()


@KINDS
@EXACT
@pytest.mark.parametrize("first", [0, 4, 9], ids=["all-here", "some-elsewhere", "all-elsewhere"])
def test_gather_and_sum_are_each_others_gradients(kind: str, exact: bool, first: int):
    everything = routing(kind, 37, 9, 2)
    experts = torch.where(everything >= first, everything - first, ELSEWHERE)
    plan = planned(experts, max(9 - first, 1), exact)
    x = torch.randn(37, 4, dtype=torch.float64, requires_grad=True)
    rows = gather_rows(x, plan.rows)
    assert torch.equal(rows, x[plan.source_P])
    y = torch.randn(rows.shape, dtype=torch.float64)
    y[int(plan.groups_E.sum()) :] = torch.nan  # nobody reads what is in no group
    y.requires_grad_()
    total = sum_rows(y, plan.rows)
    here = experts != ELSEWHERE
    expected = torch.stack([y[plan.slots_NK[n][here[n]]].sum(dim=0) for n in range(37)])
    torch.testing.assert_close(total, expected)
    (grad_x,) = torch.autograd.grad(rows, x, y.detach())
    torch.testing.assert_close(grad_x, expected.detach())
    (grad_y,) = torch.autograd.grad(total, y, x.detach())
    assert torch.equal(grad_y, x.detach()[plan.source_P])


def test_experts_beyond_16_bits_sort_too():
    experts = torch.tensor([[40_000, 3], [3, 69_999]])
    plan = planned(experts, 70_000)
    assert plan.slots_NK.tolist() == [[16, 0], [1, 32]]


def test_local_dispatch_moves_nothing():
    x, experts, weights = torch.randn(4, 8), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    dispatcher = LocalDispatcher()
    here = dispatcher.dispatch(x, experts, weights)()
    assert here.x_ND.data_ptr() == x.data_ptr()
    assert dispatcher.combine(here.x_ND, here.way_back)() is here.x_ND
