"""The small operations of a MoE layer that are several kernels of torch, or one of Triton: set from outside.

    moves          rows of tokens, sums of rows                           dispatch.py   rows_triton.py
    plan           the layout of the rows, where the host does not wait   dispatch.py   rows_triton.py
    statistics     router, experts, shared expert, norms of results       stats.py      stats_triton.py

Legend: N tokens, K choices a token, E experts, P rows, D hidden, I expert FFN.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from steptron.moe import dispatch, stats
from steptron.moe.dispatch import BY_TORCH, Plan, RowMoves
from steptron.moe.router import Routing
from steptron.moe.stats import ExpertStats, RouterStats, RowStats, SharedStats


class MoeKernels(NamedTuple):
    """The implementation of each small operation. All give the same results up to rounding."""

    moves: RowMoves
    """The moves between tokens and rows."""
    plan: Callable[[Tensor, int, int | None, bool], Plan]
    """Maps (experts [N, K], number of experts, most choices here, fill_empty) to a plan with the largest number of
    rows."""
    router_stats: Callable[[Routing, Tensor], RouterStats]
    """Maps (routing, bias [E]) to the statistics of the router."""
    out_norms: Callable[[Tensor, Tensor], Tensor]
    """Maps (result [P, D], weights [P]) to the norm of each row without its weight [P]."""
    by_expert: Callable[[RowStats, Plan], ExpertStats]
    """Maps the statistics of rows to those of experts."""
    shared_stats: Callable[[Tensor, Tensor, float | None], SharedStats]
    """Maps (gate [N, I], up [N, I], limit) to the statistics of the shared expert."""
    sums_of_norms: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Maps (routed [N, D], shared [N, D]) to the sum over tokens of the norms of each."""


def _plan(experts_NK: Tensor, num_experts: int, num_here: int | None, fill_empty: bool) -> Plan:
    return dispatch.plan_rows(experts_NK, num_experts, num_here, exact=False, fill_empty=fill_empty)


TORCH = MoeKernels(
    BY_TORCH,
    _plan,
    stats.router_stats,
    stats.out_norms,
    stats.by_expert,
    stats.shared_stats,
    stats.sums_of_norms,
)
"""The operations of torch, on any device."""


def make_moe_kernels(name: Literal["torch", "triton"]) -> MoeKernels:
    """Return the kernels with this name, whether or not they can run here. Triton is imported now."""
    if name == "torch":
        return TORCH
    from steptron.moe import rows_triton, stats_triton

    return MoeKernels(
        rows_triton.BY_TRITON,
        rows_triton.plan_rows_on_device,
        stats_triton.router_stats,
        stats_triton.out_norms,
        stats_triton.by_expert,
        stats_triton.shared_stats,
        stats_triton.sums_of_norms,
    )
