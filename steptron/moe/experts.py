"""The experts: a clipped SwiGLU of its own for each group of rows, scaled by the rows' routing weights.

    rows ─→ gate, up (a matmul an expert) ─→ h = silu(gate)≤L · up∈[−L, L] · weight ─→ down (a matmul an expert) ─→ rows

The weight multiplies h, not the result: h is narrower, and the weight's gradient Σ h·(dy·W_down) falls out of the backward pass without
the result being kept. Kept for backward are the rows, gate and up; h is computed again.

On CPU one autograd function spans it all: matmuls write straight into slices of one buffer, the elementwise part runs in fp32 over
pieces that stay in the cache, and weight gradients are written once, with no zero-filled tensors between. Elsewhere `grouped_mm` does.

Legend: P rows (padding included), D hidden, E experts, I expert FFN.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steptron.nn.mlp import clipped_swiglu

_PIECE = 1 << 16
"""Elements of one piece of the elementwise part: a few fp32 buffers of it fit in a core's cache."""


def _pieces(num_rows: int, width: int) -> list[slice]:
    step = max(1, _PIECE // width)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _matmul(groups: list[int], rows: Tensor, weights: Tensor, out: Tensor, add: bool = False) -> None:
    """out = rows · weights[e] for the rows of each group e (`add`: out += …)."""
    for size, rows_e, weight_e, out_e in zip(
        groups, rows.split(groups), weights.unbind(0), out.split(groups), strict=True
    ):
        if size and add:
            torch.addmm(out_e, rows_e, weight_e, out=out_e)
        elif size:
            torch.mm(rows_e, weight_e, out=out_e)


def _weight_grad(groups: list[int], left: Tensor, right: Tensor) -> Tensor:
    """left[e]ᵀ · right[e] of each group e, stacked; zero for an empty group."""
    grad = left.new_empty(len(groups), left.shape[1], right.shape[1])
    for size, left_e, right_e, grad_e in zip(
        groups, left.split(groups), right.split(groups), grad.unbind(0), strict=True
    ):
        if size:
            torch.mm(left_e.T, right_e, out=grad_e)
        else:
            grad_e.zero_()
    return grad


def _forward(
    rows_PD: Tensor,
    weights_P: Tensor,
    groups: list[int],
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    limit: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(result_PD, gate_PI, up_PI)."""
    num_rows, width = rows_PD.shape[0], w_gate.shape[1]
    gate_PI, up_PI, h_PI = rows_PD.new_empty(3, num_rows, width).unbind(0)
    _matmul(groups, rows_PD, w_gate.transpose(1, 2), gate_PI)
    _matmul(groups, rows_PD, w_up.transpose(1, 2), up_PI)
    for piece in _pieces(num_rows, width):
        weight = weights_P[piece, None]
        h = F.silu(gate_PI[piece].to(weight.dtype))
        up = up_PI[piece].to(weight.dtype)
        if limit is not None:
            h, up = h.clamp_(max=limit), up.clamp(-limit, limit)
        torch.mul(h.mul_(up), weight, out=h)
        h_PI[piece] = h
    result_PD = torch.empty_like(rows_PD)
    _matmul(groups, h_PI, w_down.transpose(1, 2), result_PD)
    return result_PD, gate_PI, up_PI


def _activation_grad(
    grad_PI: Tensor, gate_PI: Tensor, up_PI: Tensor, weights_P: Tensor, limit: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of h before its weight: (grad_gate_PI, grad_up_PI, grad_weights_P, h_PI with the weight)."""
    grad_gate_PI, grad_up_PI, h_PI = gate_PI.new_empty(3, *gate_PI.shape).unbind(0)
    grad_weights_P = torch.empty_like(weights_P)
    for piece in _pieces(*gate_PI.shape):
        weight = weights_P[piece, None]
        gate, up, grad = (t[piece].to(weight.dtype) for t in (gate_PI, up_PI, grad_PI))
        silu = F.silu(gate)
        act, lin = (silu, up) if limit is None else (silu.clamp(max=limit), up.clamp(-limit, limit))
        h = act * lin
        torch.sum(h * grad, dim=1, out=grad_weights_P[piece])
        h_PI[piece] = h.mul_(weight)
        grad = grad * weight
        grad_up, grad_act = act.mul_(grad), grad.mul_(lin)
        if limit is not None:
            grad_up.masked_fill_(up.abs() > limit, 0.0)
            grad_act.masked_fill_(silu > limit, 0.0)
        grad_up_PI[piece] = grad_up
        grad_gate_PI[piece] = torch.ops.aten.silu_backward(grad_act, gate)
    return grad_gate_PI, grad_up_PI, grad_weights_P, h_PI


class _CpuExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_PD: Tensor,
        weights_P: Tensor,
        groups: list[int],
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        limit: float | None,
    ) -> Tensor:
        result_PD, gate_PI, up_PI = _forward(rows_PD, weights_P, groups, w_gate, w_up, w_down, limit)
        ctx.save_for_backward(rows_PD, weights_P, w_gate, w_up, w_down, gate_PI, up_PI)
        ctx.groups, ctx.limit = groups, limit
        return result_PD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_PD, weights_P, w_gate, w_up, w_down, gate_PI, up_PI = ctx.saved_tensors
        groups = ctx.groups
        grad_PD = grads[0].contiguous()
        grad_h_PI = torch.empty_like(gate_PI)
        _matmul(groups, grad_PD, w_down, grad_h_PI)
        grad_gate_PI, grad_up_PI, grad_weights_P, h_PI = _activation_grad(
            grad_h_PI, gate_PI, up_PI, weights_P, ctx.limit
        )
        grad_w_down = _weight_grad(groups, grad_PD, h_PI)
        grad_w_gate = _weight_grad(groups, grad_gate_PI, rows_PD)
        grad_w_up = _weight_grad(groups, grad_up_PI, rows_PD)
        grad_rows_PD = torch.empty_like(rows_PD)
        _matmul(groups, grad_gate_PI, w_gate, grad_rows_PD)
        _matmul(groups, grad_up_PI, w_up, grad_rows_PD, add=True)
        return grad_rows_PD, grad_weights_P, None, grad_w_gate, grad_w_up, grad_w_down, None


def grouped_experts(
    rows_PD: Tensor,
    weights_P: Tensor,
    groups_E: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    limit: float | None,
) -> Tensor:
    """The same through `grouped_mm`, for devices that have a kernel for it. Rows after the last group are undefined."""
    ends_E = groups_E.cumsum(0, dtype=torch.int32)
    gate_PI = F.grouped_mm(rows_PD, w_gate.transpose(1, 2), offs=ends_E)
    up_PI = F.grouped_mm(rows_PD, w_up.transpose(1, 2), offs=ends_E)
    h_PI = clipped_swiglu(gate_PI.to(weights_P.dtype), up_PI.to(weights_P.dtype), limit) * weights_P[:, None]
    return F.grouped_mm(h_PI.to(rows_PD.dtype), w_down.transpose(1, 2), offs=ends_E)


class Experts(nn.Module):
    """`num_experts` gated MLPs as three tensors: w_gate and w_up [E, I, D], w_down [E, D, I]. No biases."""

    def __init__(self, num_experts: int, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.limit: float | None = None
        """Activation limit of the stage; None: off."""
        self.w_gate = nn.Parameter(torch.empty(num_experts, ffn_size, hidden_size))
        self.w_up = nn.Parameter(torch.empty(num_experts, ffn_size, hidden_size))
        self.w_down = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_size))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, rows_PD: Tensor, weights_P: Tensor, groups_E: Tensor) -> Tensor:
        """Group e of `groups_E[e]` consecutive rows through expert e, times `weights_P`; returns [P, D].

        `weights_P` is fp32 (fp64 in gradient checks); rows and parameters share a dtype.
        """
        parameters = self.w_gate, self.w_up, self.w_down
        if rows_PD.device.type != "cpu":
            return grouped_experts(rows_PD, weights_P, groups_E, *parameters, self.limit)
        groups = groups_E.tolist()
        if not torch.is_grad_enabled():
            return _forward(rows_PD, weights_P, groups, *parameters, self.limit)[0]
        result_PD: Any = _CpuExperts.apply(rows_PD, weights_P, groups, *parameters, self.limit)
        return result_PD
