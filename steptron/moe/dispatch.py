"""Dispatch: tokens to the ranks that hold their experts and back; and, on a rank, the order in which its experts take their rows.

    x_ND, routing ─ dispatcher.dispatch ─→ Dispatched (tokens here, with their choices among the experts here)
                                             └─ experts (plan_rows: rows grouped by expert) ─→ y of the same tokens
    y_ND ←──────── dispatcher.combine ←──────────────────────────────────────────────────────────┘

The rows of a group keep the order of their tokens. A group is padded to a multiple of `ROW_MULTIPLE` rows; a padding row repeats token 0
with weight 0, so it adds nothing to any gradient, and nobody reads its result.

Legend: N tokens, D hidden, E experts, K choices a token, M = N·K, P rows with padding.
"""

from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor

ROW_MULTIPLE = 16
"""oneDNN sets a matmul up anew for every row count it has not seen (~1.4 ms), and `grouped_mm` on CUDA wants aligned groups."""


class Plan(NamedTuple):
    """Which row is whose. The gradient of the gather by one table is the gather by the other: no atomics, bitwise repeatable."""

    source_P: Int64[Tensor, "P"]
    """Token of each row; 0 for padding."""
    slots_NK: Int64[Tensor, "N K"]
    """Row of each (token, choice)."""
    groups_E: Int64[Tensor, "E"]
    """Rows of each expert's group, padding included."""


class Dispatched(NamedTuple):
    """Tokens that are at the experts of this rank."""

    x_ND: Float[Tensor, "N D"]
    """The tokens."""
    experts_NK: Int64[Tensor, "N K"]
    """Their choices, numbered among the experts of this rank."""
    weights_NK: Float[Tensor, "N K"]
    """The weights of the choices."""
    way_back: Any
    """What `combine` of the same dispatcher needs."""


class Dispatcher(Protocol):
    """Brings tokens to their experts, and the experts' results back to the tokens."""

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Dispatched: ...

    def combine(self, y_ND: Tensor, way_back: Any) -> Tensor: ...


class LocalDispatcher:
    """All experts are on this rank: nothing moves."""

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Dispatched:
        return Dispatched(x_ND, experts_NK, weights_NK, None)

    def combine(self, y_ND: Tensor, way_back: None) -> Tensor:
        return y_ND


def count_tokens(experts_NK: Int64[Tensor, "N K"], num_experts: int) -> Int64[Tensor, "{num_experts}"]:
    """Tokens by expert; the sum is N·K."""
    flat_M = experts_NK.reshape(-1)
    return flat_M.new_zeros(num_experts).scatter_add_(0, flat_M, torch.ones_like(flat_M))


def plan_rows(experts_NK: Int64[Tensor, "N K"], num_experts: int) -> Plan:
    """Lay the rows out by expert.

    The number of rows is exact on CPU. Elsewhere it is the largest one possible, so that the host need not wait for the counts; rows
    after the last group belong to nobody.
    """
    num_tokens, top_k = experts_NK.shape
    num_rows = num_tokens * top_k
    counts_E = count_tokens(experts_NK, num_experts)
    groups_E = (counts_E + (ROW_MULTIPLE - 1)) // ROW_MULTIPLE * ROW_MULTIPLE
    if experts_NK.device.type == "cpu":
        padded_rows = int(groups_E.sum())
    else:
        padded_rows = (num_rows + min(num_experts, num_rows) * (ROW_MULTIPLE - 1)) // ROW_MULTIPLE * ROW_MULTIPLE
    flat_M = experts_NK.reshape(-1)
    # Narrow keys sort in fewer radix passes.
    order_M = flat_M.to(torch.int16 if num_experts < 2**15 else torch.int64).argsort(stable=True)
    padding_E = groups_E - counts_E
    # By how many padding rows the groups before an expert push its own.
    shift_E = padding_E.cumsum(0) - padding_E
    sorted_slots_M = torch.arange(num_rows, device=flat_M.device) + shift_E[flat_M[order_M]]
    slots_M = torch.empty_like(order_M)
    slots_M[order_M] = sorted_slots_M
    source_P = order_M.new_zeros(padded_rows)
    source_P[sorted_slots_M] = order_M // top_k
    return Plan(source_P, slots_M.view(num_tokens, top_k), groups_E)
