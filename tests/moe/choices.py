"""Dispatched tokens and plans of rows, made from choices of which some may be elsewhere."""

from steptron.moe.dispatch import ELSEWHERE, Dispatched, Level, Plan, plan_rows
from torch import Tensor


def dispatched(x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Dispatched:
    """Return these tokens as if they had been brought to the rank of their experts."""
    return Dispatched(x_ND, experts_NK, weights_NK, num_here(experts_NK), None)


def planned(
    experts_NK: Tensor, num_experts: int, exact: bool = True, level: Level | None = None, fill_empty: bool = False
) -> Plan:
    """Return the plan of these choices."""
    return plan_rows(experts_NK, num_experts, num_here(experts_NK), exact, level, fill_empty)


def num_here(experts_NK: Tensor) -> int | None:
    """Return the number of choices that are not elsewhere, or None if none is."""
    here = experts_NK != ELSEWHERE
    return None if here.all() else int(here.sum())
