"""The experts: a clipped SwiGLU of each expert's own for the tokens that chose it, summed over a token's choices with its weights.

    x_ND ─ gather ─→ rows by expert ─→ gate, up ─→ h = silu(gate)≤L · up∈[−L, L] · weight ─→ down ─ gather and sum ─→ y_ND

The weight multiplies h, not the result: h is narrower, and the weight's gradient Σ h·(dy·W_down) falls out of the backward pass without
the result being kept. From forward to backward live x, gate and up; rows are gathered and h is computed again.

On CPU one autograd function spans it all. It goes through the experts in blocks, small enough that a block's rows stay in the cache from
the gather to the last matmul; the elementwise part is fp32; weight gradients are written once, with no zero-filled tensors between.
Elsewhere `grouped_mm` does the matmuls of all experts at once.

Legend: N tokens, K choices a token, P rows (padding included), R rows of a block, D hidden, E experts, I expert FFN.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from steptron.moe.dispatch import Plan, add_up, gather_rows, plan_rows, sum_rows
from steptron.nn.local import local
from steptron.nn.matmul import matmul_nt
from steptron.nn.mlp import clipped_swiglu
from steptron.nn.recompute import Keep, keep

BLOCK_ROWS = 512
"""Experts share a block up to so many rows."""


class Weights(NamedTuple):
    """The parameters of the experts."""

    gate_EID: Float[Tensor, "E I D"]
    up_EID: Float[Tensor, "E I D"]
    down_EDI: Float[Tensor, "E D I"]


class Block(NamedTuple):
    """Consecutive experts that are worked on together; those without rows are left out."""

    rows: slice
    experts: list[int]
    sizes: list[int]


def plan_blocks(groups: list[int]) -> list[Block]:
    """Cut the experts, in order, into blocks of at most `BLOCK_ROWS` rows, or of one expert."""
    blocks: list[Block] = []
    start = 0
    for expert, size in enumerate(groups):
        if not size:
            continue
        last = blocks[-1] if blocks else None
        if last is not None and start + size - last.rows.start <= BLOCK_ROWS:
            blocks[-1] = Block(slice(last.rows.start, start + size), [*last.experts, expert], [*last.sizes, size])
        else:
            blocks.append(Block(slice(start, start + size), [expert], [size]))
        start += size
    return blocks


def _write_product(out_MN: Tensor, a_MK: Tensor, b_NK: Tensor) -> None:
    """out = a · bᵀ. The quick fp32 product cannot write in place; a copy out of the cache costs less than a slow product."""
    if out_MN.dtype is torch.float32:
        out_MN.copy_(matmul_nt(a_MK, b_NK))
    else:
        torch.mm(a_MK, b_NK.mT, out=out_MN)


def _write_sum(out_MN: Tensor, a_MK: Tensor, b_NK: Tensor, c_MK: Tensor, d_NK: Tensor) -> None:
    """out = a · bᵀ + c · dᵀ."""
    if out_MN.dtype is torch.float32:
        torch.add(matmul_nt(a_MK, b_NK), matmul_nt(c_MK, d_NK), out=out_MN)
    else:
        torch.mm(a_MK, b_NK.mT, out=out_MN)
        torch.addmm(out_MN, c_MK, d_NK.mT, out=out_MN)


def _products(rows: Tensor, block: Block, weights: tuple[Tensor, ...]) -> Tensor:
    """rows[e] · weights[e]ᵀ of each expert e of the block, one below the other."""
    if len(block.experts) == 1:
        return matmul_nt(rows, weights[block.experts[0]])
    out = rows.new_empty(rows.shape[0], weights[0].shape[0])
    for expert, rows_e, out_e in zip(block.experts, rows.split(block.sizes), out.split(block.sizes), strict=True):
        _write_product(out_e, rows_e, weights[expert])
    return out


def _transposed(weights: Tensor) -> tuple[Tensor, ...]:
    return weights.mT.unbind(0)


def _activate(gate_RI: Tensor, up_RI: Tensor, weights_R: Tensor, limit: float | None) -> Tensor:
    """h with its weight, in the dtype of `gate`; computed in that of the weights."""
    dtype = weights_R.dtype
    h_RI, up = F.silu(gate_RI.to(dtype)), up_RI.to(dtype)
    if limit is not None:
        h_RI, up = h_RI.clamp_(max=limit), up.clamp(-limit, limit)
    return h_RI.mul_(up).mul_(weights_R[:, None]).to(gate_RI.dtype)


def _activate_backward(
    grad_RI: Tensor, gate_RI: Tensor, up_RI: Tensor, weights_R: Tensor, limit: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of h·weight over the weight: (grad_gate_RI, grad_up_RI, grad_weights_R, h_RI with its weight).

    Works in place where it can, also on `grad_RI`: fewer buffers stay in the cache.
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
        # Masks are factors 0 and 1: masked fills are several times slower on CPU.
        grad_up.mul_(up.abs().le_(limit))
        grad_act.mul_(silu.le_(limit))
    grad_gate = torch.ops.aten.silu_backward.grad_input(grad_act, gate, grad_input=grad_act)
    return grad_gate.to(gate_RI.dtype), grad_up.to(gate_RI.dtype), grad_weights_R, h.to(gate_RI.dtype)


def _rows_weights(weights_NK: Tensor, plan: Plan) -> Tensor:
    weights_P = weights_NK.new_zeros(plan.source_P.shape[0])
    return weights_P.scatter_(0, plan.slots_NK.reshape(-1), weights_NK.reshape(-1))


def _forward(
    x_ND: Tensor, weights_NK: Tensor, plan: Plan, weights: Weights, limit: float | None, kept: list[Tensor] | None
) -> Tensor:
    """y_ND. Each block's gate and up are appended to `kept`, if there is one."""
    weights_P = _rows_weights(weights_NK, plan)
    result_PD = x_ND.new_empty(plan.source_P.shape[0], x_ND.shape[1])
    w_gate, w_up, w_down = (w.unbind(0) for w in weights)
    for block in plan_blocks(plan.groups_E.tolist()):
        x_RD = x_ND.index_select(0, plan.source_P[block.rows])
        gate_RI, up_RI = _products(x_RD, block, w_gate), _products(x_RD, block, w_up)
        h_RI = _activate(gate_RI, up_RI, weights_P[block.rows], limit)
        if kept is not None:
            kept += gate_RI, up_RI
        result_RD = result_PD[block.rows]
        for expert, h_e, result_e in zip(
            block.experts, h_RI.split(block.sizes), result_RD.split(block.sizes), strict=True
        ):
            _write_product(result_e, h_e, w_down[expert])
    return add_up(result_PD, plan.rows)


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
        limit: float | None,
    ) -> Tensor:
        weights, kept = Weights(gate_EID, up_EID, down_EDI), []
        y_ND = _forward(x_ND, weights_NK, plan, weights, limit, kept)
        ctx.save_for_backward(x_ND, weights_NK, *weights, *kept)
        ctx.plan, ctx.limit = plan, limit
        return y_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_NK, gate_EID, up_EID, down_EDI, *kept = ctx.saved_tensors
        plan: Plan = ctx.plan
        weights_P = _rows_weights(weights_NK, plan)
        grad_weights_P = torch.empty_like(weights_P)
        if plan.elsewhere_NK is not None:
            grad_weights_P[-1] = 0
        grad_rows_PD = x_ND.new_empty(plan.source_P.shape[0], x_ND.shape[1])
        gate_T, up_T, down_T = _transposed(gate_EID), _transposed(up_EID), _transposed(down_EDI)
        grads_EID = Weights(
            *(torch.empty_like(w, memory_format=torch.contiguous_format) for w in (gate_EID, up_EID, down_EDI))
        )
        groups = plan.groups_E.tolist()
        for number, block in enumerate(plan_blocks(groups)):
            rows = block.rows
            x_RD, grad_RD = (t.index_select(0, plan.source_P[rows]) for t in (x_ND, grads[0]))
            grad_gate_RI, grad_up_RI, grad_weights_P[rows], h_RI = _activate_backward(
                _products(grad_RD, block, down_T), kept[2 * number], kept[2 * number + 1], weights_P[rows], ctx.limit
            )
            pieces = (t.split(block.sizes) for t in (x_RD, grad_RD, grad_gate_RI, grad_up_RI, h_RI, grad_rows_PD[rows]))
            for e, x_e, grad_e, grad_gate_e, grad_up_e, h_e, grad_rows_e in zip(block.experts, *pieces, strict=True):
                _write_product(grads_EID.down_EDI[e], grad_e.mT, h_e.mT)
                _write_product(grads_EID.gate_EID[e], grad_gate_e.mT, x_e.mT)
                _write_product(grads_EID.up_EID[e], grad_up_e.mT, x_e.mT)
                _write_sum(grad_rows_e, grad_gate_e, gate_T[e], grad_up_e, up_T[e])
        for expert, size in enumerate(groups):
            if not size:
                for grad in grads_EID:
                    grad[expert].zero_()
        grad_x_ND = add_up(grad_rows_PD, plan.rows)
        return grad_x_ND, grad_weights_P[plan.slots_NK], None, *grads_EID, None


def _weighted_swiglu(gate_PI: Tensor, up_PI: Tensor, weights_P: Tensor, limit: float | None) -> Tensor:
    """h with its weight, in the dtype of `gate`; computed in that of the weights."""
    dtype = weights_P.dtype
    return (clipped_swiglu(gate_PI.to(dtype), up_PI.to(dtype), limit) * weights_P[:, None]).to(gate_PI.dtype)


def grouped_experts(
    x_ND: Float[Tensor, "N D"],
    weights_NK: Float[Tensor, "N K"],
    plan: Plan,
    weights: Weights,
    limit: float | None,
    keep_rows: Keep = keep,
    keep_product: Keep = keep,
) -> Float[Tensor, "N D"]:
    """The same through `grouped_mm`, for devices that have a kernel for it.

    `keep_rows`, `keep_product`: make the gathered rows and h, which backward may compute again (see nn/recompute.py)."""
    ends_E = plan.groups_E.cumsum(0, dtype=torch.int32)
    if plan.elsewhere_NK is not None:
        # The gradient at nobody's row may be anything.
        weights_NK = weights_NK.masked_fill(plan.elsewhere_NK, 0.0)
    weights_P = weights_NK.new_zeros(plan.source_P.shape[0])
    weights_P = weights_P.scatter(0, plan.slots_NK.reshape(-1), weights_NK.reshape(-1))
    rows_PD = keep_rows(gather_rows, x_ND, plan.rows)
    gate_PI = F.grouped_mm(rows_PD, weights.gate_EID.mT, offs=ends_E)
    up_PI = F.grouped_mm(rows_PD, weights.up_EID.mT, offs=ends_E)
    h_PI = keep_product(_weighted_swiglu, gate_PI, up_PI, weights_P, limit)
    result_PD = F.grouped_mm(h_PI, weights.down_EDI.mT, offs=ends_E)
    return sum_rows(result_PD, plan.rows)


class Experts(nn.Module):
    """`num_experts` gated MLPs as three tensors: w_gate and w_up [E, I, D], w_down [E, D, I]. No biases."""

    def __init__(self, num_experts: int, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.limit: float | None = None
        """Activation limit of the stage; None: off."""
        self.keep_rows: Keep = keep
        self.keep_product: Keep = keep
        """Replaced from outside where the rows, or the product before w_down, are to be computed again in backward. CPU does so anyway."""
        self.w_gate = nn.Parameter(torch.empty(num_experts, ffn_size, hidden_size))
        self.w_up = nn.Parameter(torch.empty(num_experts, ffn_size, hidden_size))
        self.w_down = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_size))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Σ_k weights[n, k] · expert experts[n, k] (x[n]): [N, D], in the dtype of `x`, which is that of the parameters.

        `experts_NK` are numbers of the experts held here; a choice `ELSEWHERE` adds nothing, and its weight's gradient is 0.
        `weights_NK` is fp32 (fp64 in gradient checks). Where a rank holds some columns of each expert, this is its part of the sum.
        """
        weights = Weights(local(self.w_gate), local(self.w_up), local(self.w_down))
        plan = plan_rows(experts_NK, weights.gate_EID.shape[0], exact=x_ND.device.type == "cpu")
        if x_ND.device.type != "cpu":
            return grouped_experts(x_ND, weights_NK, plan, weights, self.limit, self.keep_rows, self.keep_product)
        if not torch.is_grad_enabled():
            return _forward(x_ND, weights_NK, plan, weights, self.limit, None)
        y_ND: Any = _CpuExperts.apply(x_ND, weights_NK, plan, *weights, self.limit)
        return y_ND
