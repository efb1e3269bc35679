"""Dispatch: token rows to expert groups and back, by gathers in both directions (no atomics, so bitwise the same each time).

    x_ND ─ source_P ─→ rows_PD (expert 0's rows, padding, expert 1's rows, padding, …) ─→ experts ─→ rows_PD ─ slots_NK ─→ y_ND

Each group keeps its tokens in order and is padded to a multiple of `ROW_MULTIPLE` rows. A padding row repeats token 0 with weight 0, so it
adds nothing to any gradient and nobody reads its result. The gradient of either gather is the other one.

Legend: N tokens, D hidden, E experts, K experts a token, P rows with padding.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

ROW_MULTIPLE = 16
"""oneDNN sets a matmul up anew for every row count it has not seen (~1.4 ms), and `grouped_mm` on CUDA wants aligned groups."""


class Plan(NamedTuple):
    """Which row is whose."""

    source_P: Int64[Tensor, "P"]
    """Token of each row; 0 for padding."""
    slots_NK: Int64[Tensor, "N K"]
    """Row of each (token, choice)."""


class Dispatched(NamedTuple):
    """What experts work on, and what `combine` needs to bring it back."""

    rows_PD: Float[Tensor, "P D"]
    """Rows in groups by expert."""
    weights_P: Float[Tensor, "P"]
    """Routing weight of each row; 0 for padding."""
    groups_E: Int64[Tensor, "E"]
    """Rows of each group, padding included."""
    plan: Plan
    """The way back."""


class Dispatcher(Protocol):
    """Brings rows to the experts of this rank and results back to their tokens."""

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, counts_E: Tensor) -> Dispatched: ...

    def combine(self, rows_PD: Tensor, plan: Plan) -> Tensor: ...


def count_tokens(experts_NK: Int64[Tensor, "N K"], num_experts: int) -> Int64[Tensor, "E"]:
    """Tokens by expert; the sum is N·K."""
    flat_M = experts_NK.reshape(-1)
    return flat_M.new_zeros(num_experts).scatter_add_(0, flat_M, torch.ones_like(flat_M))


def plan_rows(experts_NK: Int64[Tensor, "N K"], counts_E: Int64[Tensor, "E"]) -> tuple[Plan, Int64[Tensor, "E"]]:
    """Lay the rows out; returns the plan and the padded group sizes.

    The number of rows is exact on CPU. Elsewhere it is the largest one possible, so that the host need not wait for the counts; rows
    after the last group belong to nobody.
    """
    num_tokens, top_k = experts_NK.shape
    num_rows = num_tokens * top_k
    groups_E = (counts_E + (ROW_MULTIPLE - 1)) // ROW_MULTIPLE * ROW_MULTIPLE
    if experts_NK.device.type == "cpu":
        padded_rows = int(groups_E.sum())
    else:
        most = num_rows + min(counts_E.numel(), num_rows) * (ROW_MULTIPLE - 1)
        padded_rows = most // ROW_MULTIPLE * ROW_MULTIPLE
    flat_M = experts_NK.reshape(-1)
    order_M = flat_M.argsort(stable=True)
    # By how many padding rows the groups before an expert push its own.
    shift_E = (groups_E - counts_E).cumsum(0) - (groups_E - counts_E)
    slots_sorted_M = torch.arange(num_rows, device=flat_M.device) + shift_E[flat_M[order_M]]
    slots_M = torch.empty_like(order_M)
    slots_M[order_M] = slots_sorted_M
    source_P = order_M.new_zeros(padded_rows)
    source_P[slots_sorted_M] = order_M // top_k
    return Plan(source_P, slots_M.view(num_tokens, top_k)), groups_E


def _sum_rows(rows_PD: Tensor, slots_NK: Tensor) -> Tensor:
    """Σ_k rows[slots[n, k]], in one pass over the rows."""
    return F.embedding_bag(slots_NK, rows_PD, mode="sum")


class _Gather(torch.autograd.Function):
    """x_ND → rows_PD."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return x_ND.index_select(0, plan.source_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_rows(grads[0].contiguous(), ctx.plan.slots_NK), None


class _Combine(torch.autograd.Function):
    """rows_PD → y_ND. A padding row gets token 0's gradient; its weight of 0 takes it away."""

    @staticmethod
    def forward(ctx: Any, rows_PD: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return _sum_rows(rows_PD, plan.slots_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.plan.source_P), None


class LocalDispatcher:
    """All experts are on this rank."""

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, counts_E: Tensor) -> Dispatched:
        plan, groups_E = plan_rows(experts_NK, counts_E)
        weights_P = weights_NK.new_zeros(plan.source_P.shape[0])
        weights_P = weights_P.scatter(0, plan.slots_NK.reshape(-1), weights_NK.reshape(-1))
        rows_PD: Any = _Gather.apply(x_ND, plan)
        return Dispatched(rows_PD, weights_P, groups_E, plan)

    def combine(self, rows_PD: Tensor, plan: Plan) -> Tensor:
        y_ND: Any = _Combine.apply(rows_PD, plan)
        return y_ND
