"""Experts as three grouped matrix products under plain autograd, for accelerators and any device that has `bmm`.

    x_ND ─ gather ─→ rows_PD ─ product ─→ gate, up ─ swiglu ─→ h_PI ─ product ─→ result_PD ─ gather and sum ─→ y_ND

Back ends differ in the product (`grouped_mm`, padded `bmm`, TransformerEngine's) and in the SwiGLU (torch's operations,
or one Triton kernel). The weight of a choice multiplies h, not the result, because h is narrower.

Legend: N tokens, K choices a token, P rows (padding included), D hidden, E experts, I expert FFN, S statistics. In a
product, K and N are the input and output widths. B experts of a bucket, R rows of each of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from steptron.moe.backend import Compute, Options, Weights
from steptron.moe.dispatch import Plan, gather_rows, sum_rows
from steptron.moe.stats import RowStats, SwigluRows, count_clipped, sampled_columns
from steptron.nn.mlp import clipped_swiglu

Product = Callable[[Tensor, Tensor], Tensor]
"""Maps (rows [P, K], weights [E, N, K]) to rows[e] · weights[e]ᵀ of each expert e, concatenated to [P, N]."""

PADDING = 1.25
"""The most that padding may enlarge a batched product: the rows of its largest expert ÷ those of its smallest."""


def by_products(prepare: Callable[[Plan], Product], swiglu: Callable[..., Tensor]) -> Compute:
    """Return the function that computes the experts with this product and this SwiGLU.

    `prepare` makes the product for each plan. `swiglu` writes the statistics of rows into the tensor that it is given.
    """

    def compute(
        x_ND: Tensor, weights_NK: Tensor, plan: Plan, weights: Weights, options: Options
    ) -> tuple[Tensor, RowStats | None]:
        product = prepare(plan)
        if plan.elsewhere_NK is not None:
            # The unused row's gradient is undefined, so the weights of choices elsewhere must not pass it on.
            weights_NK = weights_NK.masked_fill(plan.elsewhere_NK, 0.0)
        weights_P = weights_NK.new_zeros(plan.source_P.shape[0])
        weights_P = weights_P.scatter(0, plan.slots_NK.reshape(-1), weights_NK.reshape(-1))
        moves = options.kernels.moves
        rows_PD = options.keep_rows(gather_rows, x_ND, plan.rows, moves)
        gate_PI, up_PI = product(rows_PD, weights.gate_EID), product(rows_PD, weights.up_EID)
        seen_SP = weights_P.new_empty(len(SwigluRows._fields), len(weights_P)) if options.with_stats else None
        h_PI = options.keep_product(swiglu, gate_PI, up_PI, weights_P, options.limit, seen_SP)
        result_PD = product(h_PI, weights.down_EDI)
        y_ND = sum_rows(result_PD, plan.rows, moves)
        if seen_SP is None:
            return y_ND, None
        return y_ND, RowStats(SwigluRows(*seen_SP), options.kernels.out_norms(result_PD, weights_P))

    return compute


def torch_swiglu(
    gate_PI: Tensor, up_PI: Tensor, weights_P: Tensor, limit: float | None, seen_SP: Tensor | None
) -> Tensor:
    """Return h times the weight of its row, in the dtype of `gate`; compute it in the dtype of the weights.

    Statistics are written to `seen_SP` in the order of `SwigluRows`, unless it is None.
    """
    dtype = weights_P.dtype
    gate, up = gate_PI.to(dtype), up_PI.to(dtype)
    product_PI = clipped_swiglu(gate, up, limit)
    if seen_SP is not None:
        with torch.no_grad():
            rows = SwigluRows(*seen_SP)
            rows.h_square.copy_(product_PI.square().sum(1))
            some = sampled_columns(gate.shape[1])
            rows.gate_up.copy_((gate[:, :some] * up[:, :some]).sum(1))
            rows.gate_square.copy_(gate[:, :some].square().sum(1))
            rows.up_square.copy_(up[:, :some].square().sum(1))
            rows.peak_gate.copy_(F.silu(gate).amax(1))
            rows.peak_up.copy_(up.abs().amax(1))
            rows.clipped.copy_(torch.zeros_like(weights_P) if limit is None else count_clipped(gate, up, limit))
    return (product_PI * weights_P[:, None]).to(gate_PI.dtype)


def grouped_product(plan: Plan) -> Product:
    """Return the product by `grouped_mm`: one kernel for all experts, with group borders that stay on the device."""
    ends_E = plan.groups_E.cumsum(0, dtype=torch.int32)
    return lambda rows_PK, weights_ENK: F.grouped_mm(rows_PK, weights_ENK.mT, offs=ends_E)


class Bucket(NamedTuple):
    """Experts of similar size that share one batched product."""

    experts_B: Tensor
    """Their numbers."""
    rows_BR: Tensor
    """The rows of each expert; slots after its last row hold P, the index of a row that is discarded."""
    padding_BR1: Tensor
    """True for the slots after an expert's last row."""


def plan_buckets(groups: list[int], num_rows: int, device: torch.device) -> list[Bucket]:
    """Sort the experts that have rows by size, largest first, and start a new bucket where `PADDING` would be exceeded.

    Padding adds at most the fraction PADDING − 1 of the rows. There are at most log(largest ÷ smallest) ÷ log PADDING +
    1 buckets.
    """
    starts, start = [], 0
    for size in groups:
        starts.append(start)
        start += size
    waiting = sorted((e for e, size in enumerate(groups) if size), key=lambda e: -groups[e])
    buckets: list[Bucket] = []
    while waiting:
        largest = groups[waiting[0]]
        experts = [e for e in waiting if groups[e] * PADDING >= largest]
        waiting = waiting[len(experts) :]
        first_B1, size_B1 = torch.tensor([[starts[e], groups[e]] for e in experts], device=device).split(1, dim=1)
        place_1R = torch.arange(largest, device=device)[None]
        padding_BR = place_1R >= size_B1
        rows_BR = (first_B1 + place_1R).masked_fill(padding_BR, num_rows)
        buckets.append(Bucket(torch.tensor(experts, device=device), rows_BR, padding_BR[..., None]))
    return buckets


class _BatchedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_PK: Tensor, weights_ENK: Tensor, buckets: list[Bucket]) -> Tensor:
        ctx.save_for_backward(rows_PK, weights_ENK)
        ctx.buckets = buckets
        num_rows = rows_PK.shape[0]
        # The additional last row takes the results of padding. Rows of no bucket are unused and stay 0.
        out = rows_PK.new_zeros(num_rows + 1, weights_ENK.shape[1])
        for bucket in buckets:
            product = torch.bmm(_take(rows_PK, bucket), weights_ENK[bucket.experts_B].mT)
            out[bucket.rows_BR] = product
        return out[:num_rows]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_PK, weights_ENK = ctx.saved_tensors
        num_rows = rows_PK.shape[0]
        grad_rows = rows_PK.new_zeros(num_rows + 1, rows_PK.shape[1])
        grad_weights_ENK = torch.zeros_like(weights_ENK, memory_format=torch.contiguous_format)
        for bucket in ctx.buckets:
            grad_BRN = _take(grads[0], bucket).masked_fill_(bucket.padding_BR1, 0.0)
            grad_rows[bucket.rows_BR] = torch.bmm(grad_BRN, weights_ENK[bucket.experts_B])
            grad_weights_ENK[bucket.experts_B] = torch.bmm(grad_BRN.mT, _take(rows_PK, bucket))
        return grad_rows[:num_rows], grad_weights_ENK, None


def _take(rows_PK: Tensor, bucket: Bucket) -> Tensor:
    """Return the rows of a bucket: [B, R, K]. Padding slots hold an arbitrary row."""
    return rows_PK[bucket.rows_BR.clamp(max=rows_PK.shape[0] - 1)]


def batched_product(plan: Plan) -> Product:
    """Return the product by padded `bmm`s of experts of similar size. The host waits for the sizes of the groups."""
    buckets = plan_buckets(plan.groups_E.tolist(), plan.source_P.shape[0], plan.source_P.device)

    def product(rows_PK: Tensor, weights_ENK: Tensor) -> Tensor:
        out: Any = _BatchedProduct.apply(rows_PK, weights_ENK, buckets)
        return out

    return product
