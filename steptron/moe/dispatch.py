"""Dispatch: tokens to the ranks that hold their experts and back; and, on a rank, the order in which its experts take their rows.

    x_ND, routing ─ dispatcher.dispatch ─→ Dispatched (tokens here, with their choices among the experts here)
                                             └─ experts (plan_rows: rows grouped by expert) ─→ y of the same tokens
    y_ND ←──────── dispatcher.combine ←──────────────────────────────────────────────────────────┘

The rows of a group keep the order of their tokens. A group is padded to a multiple of `ROW_MULTIPLE` rows; a padding row repeats token 0
with weight 0, so it adds nothing to any gradient, and nobody reads its result.

A token that came from another rank has choices that are not here: their number is `ELSEWHERE`, and they take no rows.

`gather_rows` and `sum_rows` are each other's gradients: rows move by two tables, and neither direction needs atomics.

Legend: N tokens, D hidden, E experts, K choices a token, M = N·K, P rows with padding, S rows that are somebody's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

ELSEWHERE = -1
"""The number of an expert that another rank has."""

ROW_MULTIPLE = 16
"""oneDNN sets a matmul up anew for every row count it has not seen (~1.4 ms), and `grouped_mm` on CUDA wants aligned groups."""


Level = Callable[[list[int]], list[int]]
"""From the rows of each expert's group to as many or more, multiples of `ROW_MULTIPLE` too."""


class ExpertRows(NamedTuple):
    """Which row is whose, both ways."""

    source_P: Int64[Tensor, "P"]
    """Token of each row; 0 for padding."""
    slots: Int64[Tensor, "..."]
    """Rows of each token: [N, K], or [S], token after token, where their number differs."""
    starts_N: Int64[Tensor, "N"] | None = None
    """Where in `slots` [S] each token's begin."""
    nobody: int | None = None
    """A row among `slots` [N, K] that stands for none."""


class Plan(NamedTuple):
    """The rows of a rank's experts."""

    rows: ExpertRows
    """Row by token and token by row."""
    slots_NK: Int64[Tensor, "N K"]
    """Row of each (token, choice); of a choice elsewhere the last row, which is in no group."""
    groups_E: Int64[Tensor, "E"]
    """Rows of each expert's group, padding included."""
    counts_E: Int64[Tensor, "E"]
    """Rows of each expert's group that are a token's; they come first."""
    elsewhere_NK: Tensor | None = None
    """Whether the choice is elsewhere; None: none is."""

    @property
    def source_P(self) -> Tensor:
        """Token of each row; 0 for padding."""
        return self.rows.source_P


class Dispatched(NamedTuple):
    """Tokens that are at the experts of this rank."""

    x_ND: Float[Tensor, "N D"]
    """The tokens."""
    experts_NK: Int64[Tensor, "N K"]
    """Their choices, numbered among the experts of this rank, or `ELSEWHERE`."""
    weights_NK: Float[Tensor, "N K"]
    """The weights of the choices; 0 elsewhere."""
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


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, rows: ExpertRows) -> Tensor:
        ctx.rows = rows
        return x_ND.index_select(0, rows.source_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return add_up(grads[0].contiguous(), ctx.rows), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, rows: ExpertRows) -> Tensor:
        ctx.rows = rows
        return add_up(y_PD, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.rows.source_P), None


def gather_rows(x_ND: Tensor, rows: ExpertRows) -> Tensor:
    """The token of each row: [P, D]. Padding repeats token 0 and sends it no gradient."""
    x_PD: Any = _Gather.apply(x_ND, rows)
    return x_PD


def sum_rows(y_PD: Tensor, rows: ExpertRows) -> Tensor:
    """The sum of each token's rows: [N, D]. Padding is left out, but gets token 0's gradient; whoever made the row drops it."""
    y_ND: Any = _Sum.apply(y_PD, rows)
    return y_ND


def add_up(y_PD: Tensor, rows: ExpertRows) -> Tensor:
    """`sum_rows` without autograd: one pass over the rows, in the order of each token's slots."""
    return F.embedding_bag(rows.slots, y_PD, rows.starts_N, mode="sum", padding_idx=rows.nobody)


def count_tokens(experts_NK: Int64[Tensor, "N K"], num_experts: int) -> Int64[Tensor, "{num_experts}"]:
    """Tokens by expert; the sum is N·K."""
    flat_M = experts_NK.reshape(-1)
    return flat_M.new_zeros(num_experts).scatter_add_(0, flat_M, torch.ones_like(flat_M))


def plan_rows(
    experts_NK: Int64[Tensor, "N K"], num_experts: int, exact: bool = True, level: Level | None = None
) -> Plan:
    """Lay the rows out by expert; a choice `ELSEWHERE` takes none.

    Where `exact`, their number is read from the counts. Otherwise it is the largest one possible, and any choice may be elsewhere, so
    that the host need not wait for an accelerator; rows after the last group belong to nobody. `level` may make groups larger.
    """
    num_tokens, top_k = experts_NK.shape
    num_choices = num_tokens * top_k
    flat_M = experts_NK.reshape(-1)
    elsewhere_M = flat_M < 0 if num_choices else None
    if exact and elsewhere_M is not None and not elsewhere_M.any():
        elsewhere_M = None
    # Choices elsewhere are a group after the last, of which one row is left: nobody's.
    keys_M = flat_M if elsewhere_M is None else flat_M.masked_fill(elsewhere_M, num_experts)
    counts = count_tokens(keys_M[:, None], num_experts + (elsewhere_M is not None))
    counts_E = counts[:num_experts]
    groups_E = (counts_E + (ROW_MULTIPLE - 1)) // ROW_MULTIPLE * ROW_MULTIPLE
    if exact:
        groups = groups_E.tolist()
        if level is not None:
            groups = level(groups)
            groups_E = torch.tensor(groups, device=groups_E.device)
        padded_rows = sum(groups)
    else:
        padded_rows = (num_choices + min(num_experts, num_choices) * (ROW_MULTIPLE - 1)) // ROW_MULTIPLE * ROW_MULTIPLE
    if elsewhere_M is not None:
        padded_rows += ROW_MULTIPLE
    # Narrow keys sort in fewer radix passes.
    order_M = keys_M.to(torch.int16 if num_experts < 2**15 - 1 else torch.int64).argsort(stable=True)
    padding = F.pad(groups_E - counts_E, (0, counts.shape[0] - num_experts))
    # By how many padding rows the groups before an expert push its own.
    shift = padding.cumsum(0) - padding
    sorted_slots_M = torch.arange(num_choices, device=flat_M.device) + shift[keys_M[order_M]]
    if elsewhere_M is not None:
        sorted_slots_M.masked_fill_(elsewhere_M[order_M], padded_rows - 1)
    slots_M = torch.empty_like(order_M)
    slots_M[order_M] = sorted_slots_M
    source_P = order_M.new_zeros(padded_rows)
    source_P[sorted_slots_M] = order_M // top_k
    slots_NK = slots_M.view(num_tokens, top_k)
    if elsewhere_M is None:
        return Plan(ExpertRows(source_P, slots_NK), slots_NK, groups_E, counts_E)
    elsewhere_NK = elsewhere_M.view(num_tokens, top_k)
    if not exact:
        return Plan(ExpertRows(source_P, slots_NK, nobody=padded_rows - 1), slots_NK, groups_E, counts_E, elsewhere_NK)
    return Plan(ragged_rows(source_P, slots_NK, ~elsewhere_NK), slots_NK, groups_E, counts_E, elsewhere_NK)


def ragged_rows(source_P: Tensor, slots_NK: Tensor, here_NK: Tensor) -> ExpertRows:
    """Rows of tokens that have not all the same number of them: those slots that `here` marks. The host waits for their number."""
    sizes_N = here_NK.sum(dim=1)
    return ExpertRows(source_P, slots_NK[here_NK], sizes_N.cumsum(0) - sizes_N)
