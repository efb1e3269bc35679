"""Experts on a CPU, computed in blocks of neighbouring experts whose rows stay in the cache throughout.

One autograd function covers the whole computation. It keeps x, gate and up for backward, which gathers the rows and
computes h again. Elementwise operations are fp32. Weight gradients are written once, without zero-filled intermediate
tensors.

Legend: N tokens, K choices a token, P rows (padding included), R rows of a block, D hidden, E experts, I expert FFN.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from steptron.moe.backend import Options, Weights
from steptron.moe.dispatch import Plan, add_up
from steptron.moe.stats import RowStats, SwigluRows, count_clipped, sampled_columns
from steptron.nn.matmul import matmul_nt, write_products

BLOCK_ROWS = 512
"""The largest number of rows of a block that holds several experts."""
WASTE = 1.15
"""The most that levelling may enlarge a run of experts: padded rows ÷ rows needed."""


class EqualExperts(NamedTuple):
    """Neighbouring experts with the same number of rows, computed by one batched product."""

    first: int
    count: int
    rows: slice
    """The rows of these experts, counted from the start of the block."""

    def cut(self, rows_RX: Tensor) -> Tensor:
        """Return the rows of these experts as a view [count, rows each, X]; `rows_RX` are the rows of the block."""
        return rows_RX[self.rows].unflatten(0, (self.count, -1))

    def choose(self, weights: Tensor) -> Tensor:
        """Return the weights of these experts as a view."""
        return weights[self.first : self.first + self.count]


class ExpertBlock(NamedTuple):
    """Consecutive experts that are computed together; experts without rows are left out."""

    rows: slice
    runs: list[EqualExperts]


def level(groups: list[int]) -> list[int]:
    """Return the rows of each expert's group, enlarged so that neighbours of similar size have equally many.

    The rows of such a run are at most `WASTE` times those given, and at most `BLOCK_ROWS`. Empty groups stay empty.
    """
    levelled: list[int] = []
    while (first := len(levelled)) < len(groups):
        last, top, total = first + 1, groups[first], groups[first]
        while last < len(groups) and groups[last]:
            highest, rows = max(top, groups[last]), (last + 1 - first) * max(top, groups[last])
            if not top or rows > min(BLOCK_ROWS, WASTE * (total + groups[last])):
                break
            last, top, total = last + 1, highest, total + groups[last]
        levelled += [top] * (last - first)
    return levelled


def plan_blocks(groups: list[int]) -> list[ExpertBlock]:
    """Split the experts, in order, into blocks of at most `BLOCK_ROWS` rows; a larger expert is a block of its own."""
    blocks: list[ExpertBlock] = []
    start = 0
    for expert, size in enumerate(groups):
        if not size:
            continue
        if not blocks or start + size - blocks[-1].rows.start > BLOCK_ROWS:
            blocks.append(ExpertBlock(slice(start, start), []))
        first, runs = blocks[-1].rows.start, blocks[-1].runs
        rows, last = slice(start - first, start - first + size), runs[-1] if runs else None
        if last is not None and last.first + last.count == expert and groups[last.first] == size:
            runs[-1] = EqualExperts(last.first, last.count + 1, slice(last.rows.start, rows.stop))
        else:
            runs.append(EqualExperts(expert, 1, rows))
        start += size
        blocks[-1] = ExpertBlock(slice(first, start), runs)
    return blocks


def _products(rows_RK: Tensor, block: ExpertBlock, weights_ENK: Tensor) -> Tensor:
    """Return rows[e] · weights[e]ᵀ of each expert e of the block, concatenated to [R, N]."""
    if len(block.runs) == block.runs[0].count == 1:
        return matmul_nt(rows_RK, weights_ENK[block.runs[0].first])
    out_RN = rows_RK.new_empty(rows_RK.shape[0], weights_ENK.shape[1])
    for run in block.runs:
        write_products(run.cut(out_RN), run.cut(rows_RK), run.choose(weights_ENK))
    return out_RN


def _activate(
    gate_RI: Tensor, up_RI: Tensor, weights_R: Tensor, limit: float | None, sums: "_RowSums | None", rows: slice
) -> Tensor:
    """Return h times the weight of its row, in the dtype of `gate`; compute it in the dtype of the weights.

    If `sums` is given, the statistics of these rows are added to it.
    """
    dtype = weights_R.dtype
    gate, up = gate_RI.to(dtype), up_RI.to(dtype)
    if sums is not None:
        sums.add_inputs(rows, gate, up, limit)
    h_RI, lin = F.silu(gate), up
    if limit is not None:
        h_RI, lin = h_RI.clamp_(max=limit), up.clamp(-limit, limit)
    h_RI.mul_(lin).mul_(weights_R[:, None])
    if sums is not None:
        sums.add_product(rows, h_RI)
    return h_RI.to(gate_RI.dtype)


def _activate_backward(
    grad_RI: Tensor, gate_RI: Tensor, up_RI: Tensor, weights_R: Tensor, limit: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (grad_gate_RI, grad_up_RI, grad_weights_R, h_RI times its weight).

    `grad_RI` is the gradient of the down projection's input, h times its weight. The function works in place where it
    can, also on `grad_RI`, so that fewer buffers compete for the cache.
    """
    dtype = weights_R.dtype
    gate, up, grad = gate_RI.to(dtype), up_RI.to(dtype), grad_RI.to(dtype)
    silu = F.silu(gate)
    act, lin = (silu, up) if limit is None else (silu.clamp(max=limit), up.clamp(-limit, limit))
    h = act * lin
    grad_weights_R = (h * grad).sum(dim=1)
    h.mul_(weights_R[:, None])
    grad.mul_(weights_R[:, None])
    grad_up, grad_act = act.mul_(grad), grad.mul_(lin)
    if limit is not None:
        # Multiply with masks of 0 and 1: masked fills are several times slower on a CPU.
        grad_up.mul_(up.abs().le_(limit))
        grad_act.mul_(silu.le_(limit))
    grad_gate = torch.ops.aten.silu_backward.grad_input(grad_act, gate, grad_input=grad_act)
    return grad_gate.to(gate_RI.dtype), grad_up.to(gate_RI.dtype), grad_weights_R, h.to(gate_RI.dtype)


def _rows_weights(weights_NK: Tensor, plan: Plan) -> Tensor:
    weights_P = weights_NK.new_zeros(plan.source_P.shape[0])
    return weights_P.scatter_(0, plan.slots_NK.reshape(-1), weights_NK.reshape(-1))


class _RowSums:
    """Statistics of rows, collected block by block while the values are in the cache."""

    def __init__(self, weights_P: Tensor, result_PD: Tensor, width: int) -> None:
        self._weights_P = weights_P
        self._columns = weights_P.new_zeros(8, weights_P.shape[0])
        # The sampled columns of gate and up are small enough to be kept until all blocks are done: three passes over
        # all of them cost less than three passes over each block.
        self._samples = weights_P.new_empty(2, weights_P.shape[0], sampled_columns(width))
        # Norms are stored in the result's dtype: in bf16 they have three digits, but the pass takes half the time.
        self._result_norms_P = result_PD.new_zeros(result_PD.shape[0])

    def add_inputs(self, rows: slice, gate_RI: Tensor, up_RI: Tensor, limit: float | None) -> None:
        """Add the statistics of SwiGLU's inputs; `gate` and `up` are in the dtype of the weights."""
        columns, some = self._columns[:, rows], self._samples.shape[2]
        peaks = columns[4:6]
        # SiLU grows monotonically where it is positive, and the limit clips only positive values of it: the SiLU of the
        # largest gate is the peak.
        torch.amax(gate_RI, dim=1, out=peaks[0])
        torch.amax(up_RI.abs(), dim=1, out=peaks[1])
        self._samples[0, rows] = gate_RI[:, :some]
        self._samples[1, rows] = up_RI[:, :some]
        # silu(x) ≤ x for x ≥ 0. So if no peak exceeds the limit, which is the usual case, nothing was clipped.
        if limit is not None and not peaks.amax() <= limit:
            over = torch.maximum(F.silu(peaks[0]), peaks[1]).gt(limit).nonzero().flatten()
            columns[6, over] = count_clipped(gate_RI[over], up_RI[over], limit).to(columns.dtype)

    def add_product(self, rows: slice, h_RI: Tensor) -> None:
        """Store the norm of h times its weight; `finish` divides by the weight."""
        torch.linalg.vector_norm(h_RI, dim=1, out=self._columns[0, rows])

    def add_result(self, rows: slice, result_RD: Tensor) -> None:
        torch.linalg.vector_norm(result_RD, dim=1, out=self._result_norms_P[rows])

    def finish(self) -> Tensor:
        """Return the statistics as [8, P]: norms become squares, the largest gate becomes its SiLU.

        Weights of choices are divided out of the norms that contain them.
        """
        c, weight_P = self._columns, self._weights_P
        inverse_P = torch.where(weight_P > 0, 1 / weight_P, 0.0)
        c[0] = (c[0] * inverse_P).square_()
        torch.linalg.vecdot(*self._samples, out=c[1])
        torch.linalg.vector_norm(self._samples, dim=2, out=c[2:4])
        c[2:4].square_()
        c[4] = F.silu(c[4])
        torch.mul(self._result_norms_P, inverse_P, out=c[7])
        return c


def row_stats(columns_8P: Tensor) -> RowStats:
    """Return the columns of `_RowSums.finish` as named fields."""
    *swiglu, out_norm = columns_8P.unbind(0)
    return RowStats(SwigluRows(*swiglu), out_norm)


def _forward(
    x_ND: Tensor,
    weights_NK: Tensor,
    plan: Plan,
    weights: Weights,
    options: Options,
    kept: list[Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """Return (y_ND, statistics of rows [8, P], or None if not asked for).

    The gate and up of each block are appended to `kept`, unless it is None.
    """
    weights_P = _rows_weights(weights_NK, plan)
    result_PD = x_ND.new_empty(plan.source_P.shape[0], x_ND.shape[1])
    sums = _RowSums(weights_P, result_PD, weights.up_EID.shape[1]) if options.with_stats else None
    w_gate, w_up, w_down = weights
    for block in plan_blocks(plan.groups_E.tolist()):
        x_RD = x_ND.index_select(0, plan.source_P[block.rows])
        gate_RI, up_RI = _products(x_RD, block, w_gate), _products(x_RD, block, w_up)
        h_RI = _activate(gate_RI, up_RI, weights_P[block.rows], options.limit, sums, block.rows)
        if kept is not None:
            kept += gate_RI, up_RI
        result_RD = result_PD[block.rows]
        for run in block.runs:
            write_products(run.cut(result_RD), run.cut(h_RI), run.choose(w_down))
        if sums is not None:
            sums.add_result(block.rows, result_RD)
    return add_up(result_PD, plan.rows), None if sums is None else sums.finish()


class _CpuExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NK: Tensor,
        plan: Plan,
        gate_EID: Tensor,
        up_EID: Tensor,
        down_EDI: Tensor,
        options: Options,
    ) -> tuple[Tensor, Tensor | None]:
        weights, kept = Weights(gate_EID, up_EID, down_EDI), []
        y_ND, columns_8P = _forward(x_ND, weights_NK, plan, weights, options, kept)
        ctx.save_for_backward(x_ND, weights_NK, *weights, *kept)
        ctx.plan, ctx.limit = plan, options.limit
        if columns_8P is not None:
            ctx.mark_non_differentiable(columns_8P)
        return y_ND, columns_8P

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_ND, weights_NK, gate_EID, up_EID, down_EDI, *kept = ctx.saved_tensors
        plan: Plan = ctx.plan
        weights_P = _rows_weights(weights_NK, plan)
        grad_weights_P = torch.empty_like(weights_P)
        if plan.elsewhere_NK is not None:
            grad_weights_P[-1] = 0
        grad_rows_PD = x_ND.new_empty(plan.source_P.shape[0], x_ND.shape[1])
        grads_EID = Weights(
            *(torch.empty_like(w, memory_format=torch.contiguous_format) for w in (gate_EID, up_EID, down_EDI))
        )
        groups = plan.groups_E.tolist()
        for number, block in enumerate(plan_blocks(groups)):
            rows = block.rows
            x_RD, grad_RD = (t.index_select(0, plan.source_P[rows]) for t in (x_ND, grads[0]))
            grad_gate_RI, grad_up_RI, grad_weights_P[rows], h_RI = _activate_backward(
                _products(grad_RD, block, down_EDI.mT),
                kept[2 * number],
                kept[2 * number + 1],
                weights_P[rows],
                ctx.limit,
            )
            grad_rows_RD = grad_rows_PD[rows]
            for run in block.runs:
                x_e, grad_e, grad_gate_e, grad_up_e, h_e, grad_rows_e = (
                    run.cut(t) for t in (x_RD, grad_RD, grad_gate_RI, grad_up_RI, h_RI, grad_rows_RD)
                )
                write_products(run.choose(grads_EID.down_EDI), grad_e.mT, h_e.mT)
                write_products(run.choose(grads_EID.gate_EID), grad_gate_e.mT, x_e.mT)
                write_products(run.choose(grads_EID.up_EID), grad_up_e.mT, x_e.mT)
                write_products(grad_rows_e, grad_gate_e, run.choose(gate_EID).mT)
                write_products(grad_rows_e, grad_up_e, run.choose(up_EID).mT, add=True)
        for expert, size in enumerate(groups):
            if not size:
                for grad in grads_EID:
                    grad[expert].zero_()
        grad_x_ND = add_up(grad_rows_PD, plan.rows)
        return grad_x_ND, grad_weights_P[plan.slots_NK], None, *grads_EID, None


def compute_in_blocks(
    x_ND: Tensor, weights_NK: Tensor, plan: Plan, weights: Weights, options: Options
) -> tuple[Tensor, RowStats | None]:
    """Return (Σ_k weight · expert(x) [N, D], statistics of rows, or None if not asked for)."""
    if torch.is_grad_enabled():
        y_ND, columns_8P = _CpuExperts.apply(x_ND, weights_NK, plan, *weights, options)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        y_ND, columns_8P = _forward(x_ND, weights_NK, plan, weights, options, None)
    return y_ND, None if columns_8P is None else row_stats(columns_8P)
