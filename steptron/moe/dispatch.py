"""Dispatch: move tokens to the ranks of their experts and back, and order a rank's rows by expert.

    x_ND, routing ─ dispatcher.dispatch ─→ Dispatched (tokens here, with their choices among the experts here)
                                             └─ experts (plan_rows: rows grouped by expert) ─→ y of the same tokens
    y_ND ←──────── dispatcher.combine ←──────────────────────────────────────────────────────────┘

Both start to move tensors, and return a function that waits for them: other work may run in between.

The rows of a group keep the order of their tokens. Each group is padded to a multiple of `ROW_MULTIPLE` rows. A padding
row repeats token 0 with weight 0: it adds nothing to any gradient, and its result is never read.

A token that came from another rank may have chosen experts that are not on this rank. Such a choice has the number
`ELSEWHERE` and takes no row.

`gather_rows` and `sum_rows` are each other's gradients. Both directions read from index tables, so neither needs
atomics.

Legend: N tokens, D hidden, E experts, K choices a token, M = N·K, P rows with padding, S rows without padding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

ELSEWHERE = -1
"""The number that stands for any expert held by another rank."""

ROW_MULTIPLE = 16
"""Groups are padded to a multiple of so many rows.

oneDNN spends ~1.4 ms on every row count that it has not met before, and `grouped_mm` on CUDA needs aligned groups.
"""


Level = Callable[[list[int]], list[int]]
"""Maps the rows of each expert's group to equal or larger numbers, which are multiples of `ROW_MULTIPLE` too."""


class ExpertRows(NamedTuple):
    """Index tables between rows and tokens, in both directions."""

    source_P: Int64[Tensor, "P"]
    """Token of each row; 0 for padding."""
    slots: Int64[Tensor, "..."]
    """Rows of each token: [N, K], or a flat [S], token after token, if tokens differ in their number of rows."""
    starts_N: Int64[Tensor, "N"] | None = None
    """Start of each token's rows in the flat `slots` [S]; None if `slots` is [N, K]."""
    nobody: int | None = None
    """The row that `slots` [N, K] gives for a choice without a row; None if every choice has one."""


class Plan(NamedTuple):
    """The layout of the rows that the experts of this rank compute."""

    rows: ExpertRows
    """Row by token and token by row."""
    slots_NK: Int64[Tensor, "N K"]
    """Row of each (token, choice). A choice elsewhere has the last row, which belongs to no group."""
    groups_E: Int64[Tensor, "E"]
    """Rows of each expert's group, padding included."""
    counts_E: Int64[Tensor, "E"]
    """Rows of each expert's group without padding; they come first in the group."""
    elsewhere_NK: Tensor | None = None
    """True for a choice of an expert on another rank; None if there is no such choice."""

    @property
    def source_P(self) -> Tensor:
        """Token of each row; 0 for padding."""
        return self.rows.source_P


class Dispatched(NamedTuple):
    """The tokens that were brought to the experts of this rank."""

    x_ND: Float[Tensor, "N D"]
    """The tokens."""
    experts_NK: Int64[Tensor, "N K"]
    """Their choices, numbered among the experts of this rank, or `ELSEWHERE`."""
    weights_NK: Float[Tensor, "N K"]
    """The weights of the choices; 0 for a choice elsewhere."""
    num_here: int | None
    """The most choices that are not elsewhere. None if no choice can be elsewhere."""
    way_back: Any
    """State that `combine` of the same dispatcher needs to return the results."""
    overflow: Tensor | None = None
    """The number of choices that were left out because they did not fit, int64 scalar; None without a capacity."""


T = TypeVar("T")
Arriving = Callable[[], T]
"""Waits for something that is on its way, and returns it. It must be called once."""


class Dispatcher(Protocol):
    """Brings tokens to their experts, and the results of the experts back to the tokens."""

    def dispatch(
        self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, capacity: float | None = None
    ) -> Arriving[Dispatched]:
        """Start to bring the tokens to their experts.

        With a capacity the buffers have a fixed size, this factor times an even share, and the host does not wait.
        Choices that do not fit are left out and counted.
        """
        ...

    def combine(self, y_ND: Tensor, way_back: Any) -> Arriving[Tensor]:
        """Start to bring the results of the experts back, and to sum those of each token."""
        ...


class LocalDispatcher:
    """The dispatcher of a rank that holds all experts: nothing moves."""

    def dispatch(
        self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, capacity: float | None = None
    ) -> Arriving[Dispatched]:
        # Autograd takes nodes in the opposite order of their making. So the gradient of the experts comes after that of
        # work that runs in between, as it does for tokens that travel.
        x_ND = x_ND.view_as(x_ND)
        return lambda: Dispatched(x_ND, experts_NK, weights_NK, None, None)

    def combine(self, y_ND: Tensor, way_back: None) -> Arriving[Tensor]:
        return lambda: y_ND


class RowMoves(NamedTuple):
    """The two moves between tokens and rows, without autograd. Set from outside for the device."""

    take: Callable[[Tensor, Tensor], Tensor]
    """Maps (x [N, D], source [P]) to the token of each row [P, D]."""
    add_up: Callable[[Tensor, ExpertRows], Tensor]
    """Maps (y [P, D], rows) to the sum of each token's rows [N, D], in the order of its slots."""


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, rows: ExpertRows, by: RowMoves) -> Tensor:
        ctx.rows, ctx.by = rows, by
        return by.take(x_ND, rows.source_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.by.add_up(grads[0].contiguous(), ctx.rows), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, rows: ExpertRows, by: RowMoves) -> Tensor:
        ctx.rows, ctx.by = rows, by
        return by.add_up(y_PD, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.by.take(grads[0], ctx.rows.source_P), None, None


def take(x_ND: Tensor, source_P: Tensor) -> Tensor:
    """Compute `gather_rows` without autograd."""
    return x_ND.index_select(0, source_P)


def add_up(y_PD: Tensor, rows: ExpertRows) -> Tensor:
    """Compute `sum_rows` without autograd, in one pass over the rows, in the order of each token's slots."""
    return F.embedding_bag(rows.slots, y_PD, rows.starts_N, mode="sum", padding_idx=rows.nobody)


BY_TORCH = RowMoves(take, add_up)
"""The moves of rows by torch's operations."""


def gather_rows(x_ND: Tensor, rows: ExpertRows, by: RowMoves = BY_TORCH) -> Tensor:
    """Return the token of each row: [P, D]. Padding rows repeat token 0 and send no gradient to it."""
    x_PD: Any = _Gather.apply(x_ND, rows, by)
    return x_PD


def sum_rows(y_PD: Tensor, rows: ExpertRows, by: RowMoves = BY_TORCH) -> Tensor:
    """Return the sum of each token's rows: [N, D].

    Padding rows are left out, but receive the gradient of token 0: the function that made the rows must drop it.
    """
    y_ND: Any = _Sum.apply(y_PD, rows, by)
    return y_ND


def count_tokens(experts_NK: Int64[Tensor, "N K"], num_experts: int) -> Int64[Tensor, "{num_experts}"]:
    """Return the number of choices of each expert; they sum to N·K."""
    flat_M = experts_NK.reshape(-1)
    return flat_M.new_zeros(num_experts).scatter_add_(0, flat_M, torch.ones_like(flat_M))


def plan_rows(
    experts_NK: Int64[Tensor, "N K"],
    num_experts: int,
    num_here: int | None,
    exact: bool = True,
    level: Level | None = None,
    fill_empty: bool = False,
) -> Plan:
    """Lay the rows out by expert. At most `num_here` choices take a row, or all if it is None; others are `ELSEWHERE`.

    If `exact`, the number of rows is read from the counts, which makes the host wait for the accelerator. Otherwise it
    is the largest that `num_here` choices can need, and rows after the last group are unused. `level` may enlarge the
    groups; it is used only if `exact`. `fill_empty` gives an expert without rows a group of padding.
    """
    num_tokens, top_k = experts_NK.shape
    num_choices = num_tokens * top_k
    flat_M = experts_NK.reshape(-1)
    elsewhere_M = None if num_here is None or num_choices == 0 else flat_M < 0
    # Choices elsewhere form a group after the last expert. All of them share one row, which is never read.
    keys_M = flat_M if elsewhere_M is None else flat_M.masked_fill(elsewhere_M, num_experts)
    counts = count_tokens(keys_M[:, None], num_experts + (elsewhere_M is not None))
    counts_E = counts[:num_experts]
    # Round up to the multiple, which is a power of two.
    groups_E = ((counts_E.clamp(min=1) if fill_empty else counts_E) + (ROW_MULTIPLE - 1)) & -ROW_MULTIPLE
    if exact:
        groups = groups_E.tolist()
        if level is not None:
            groups = level(groups)
            groups_E = torch.tensor(groups, device=groups_E.device)
        padded_rows = sum(groups)
    else:
        padded_rows = most_rows(num_choices if num_here is None else num_here, num_experts, fill_empty)
    if elsewhere_M is not None:
        padded_rows += ROW_MULTIPLE
    # Radix sort takes fewer passes over narrow keys.
    order_M = keys_M.to(torch.int16 if num_experts < 2**15 - 1 else torch.int64).argsort(stable=True)
    padding = F.pad(groups_E - counts_E, (0, counts.shape[0] - num_experts))
    # The padding rows of all groups before an expert shift its own rows.
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


def most_rows(num_choices: int, num_experts: int, fill_empty: bool) -> int:
    """Return the most rows that so many choices of these experts can need, padding included."""
    padding = num_experts * ROW_MULTIPLE if fill_empty else min(num_experts, num_choices) * (ROW_MULTIPLE - 1)
    return (num_choices + padding) // ROW_MULTIPLE * ROW_MULTIPLE


def ragged_rows(source_P: Tensor, slots_NK: Tensor, here_NK: Tensor) -> ExpertRows:
    """Return the index tables of tokens with different numbers of rows: the slots that `here_NK` marks.

    The host waits for the number of rows.
    """
    sizes_N = here_NK.sum(dim=1)
    return ExpertRows(source_P, slots_NK[here_NK], sizes_N.cumsum(0) - sizes_N)
