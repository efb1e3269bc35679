"""Dispatch: layout of the rows, and both gathers with their gradients."""

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
def test_rows_lie_in_groups_in_token_order(kind: str):
    experts = routing(kind, 37, 9, 2)
    counts = count_tokens(experts, 9)
    assert counts.tolist() == [(experts == e).sum().item() for e in range(9)]
    plan, groups = plan_rows(experts, counts)
    assert all(size % ROW_MULTIPLE == 0 for size in groups.tolist())
    start = 0
    for e, (count, size) in enumerate(zip(counts.tolist(), groups.tolist(), strict=True)):
        tokens = [n for n in range(37) if e in experts[n].tolist()]
        assert plan.source_P[start : start + count].tolist() == tokens
        assert 0 <= size - count < ROW_MULTIPLE
        start += size
    assert start == plan.source_P.shape[0]
    ends = groups.cumsum(0)
    for n in range(37):
        for k, slot in enumerate(plan.slots_NK[n].tolist()):
            assert plan.source_P[slot] == n
            assert torch.searchsorted(ends, slot, right=True) == experts[n, k]


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_there_and_back_is_the_sum_of_the_copies(kind: str, dtype: torch.dtype):
    experts = routing(kind, 37, 9, 2)
    x, weights = torch.randn(37, 24, dtype=dtype), torch.rand(experts.shape) + 0.1
    dispatcher = LocalDispatcher()
    rows, weights_P, _, plan = dispatcher.dispatch(x, experts, weights, count_tokens(experts, 9))
    assert rows.dtype is dtype
    assert weights_P.sum().item() == pytest.approx(weights.sum().item(), rel=1e-5)
    assert (weights_P > 0).sum() == experts.numel()
    torch.testing.assert_close(dispatcher.combine(rows, plan), x * experts.shape[1])


def test_gradients_in_float64():
    experts = routing("spread", 11, 5, 2)
    x = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(11, 2, dtype=torch.float64, requires_grad=True)
    dispatcher, counts = LocalDispatcher(), count_tokens(experts, 5)

    def there_and_back(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows, weights_P, _, plan = dispatcher.dispatch(x, experts, weights, counts)
        # Weights take padding rows out, as the experts do.
        return dispatcher.combine(torch.tanh(rows) * weights_P[:, None], plan)

    assert torch.autograd.gradcheck(there_and_back, (x, weights))
