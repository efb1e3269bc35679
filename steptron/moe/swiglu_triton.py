"""Clipped SwiGLU of the experts on GPUs: product, row weight and row statistics in one kernel, the gradient in another.

    act = min(silu(gate), L)    lin = clamp(up, −L, L)    h = act · lin · weight

Each program owns a block of rows and processes them tile by tile along the columns. So the sums of a row are made by
one program in one order, whatever the other rows hold: no atomics, and the same bits each time. Arithmetic is fp32;
tensors keep the caller's dtype.

Clips and their masks are comparisons, not minima: the minimum of NaN and L on a GPU is L, which would hide a NaN.

Importing this module requires Triton. The tests run the kernels under Triton's interpreter and compile them for sm_90.
They have not run on a GPU; tile sizes are estimates (one 16-byte load per thread), not tuned.

Legend: P rows, I expert FFN, S statistics. In kernels the suffix is that of the tensor to which a pointer leads, or of
a tile of it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from steptron.moe.stats import sampled_columns
from steptron.nn import triton_launch
from steptron.nn.triton_launch import blocks, power_of_two
from steptron.nn.triton_parts import read, sigmoid

TILE = 1024
"""Number of elements that a program holds at a time."""

BLOCK_I = 256
"""Number of columns of a tile; fewer if rows are shorter."""


@triton.jit
def _clip_above(x, limit):
    return tl.where(x > limit, limit, x)


@triton.jit
def _forward_kernel(
    gate_PI,
    up_PI,
    weights_P,
    h_PI,
    stats_SP,
    num_rows,
    width,
    limit,
    sampled,
    HAS_LIMIT: tl.constexpr,
    WITH_STATS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    row_is = rows < num_rows
    # 64 bits, because P · I exceeds 2³¹.
    starts = rows.to(tl.int64)[:, None] * width
    weights = tl.load(weights_P + rows, mask=row_is, other=0.0).to(tl.float32)
    h_square = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
    gate_up = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
    gate_square = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
    up_square = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
    peak_gate = tl.full([BLOCK_P, BLOCK_I], float("-inf"), tl.float32)
    peak_up = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
    gate_broken = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
    up_broken = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
    clipped = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
    for first in range(0, width, BLOCK_I):
        columns = (first + tl.arange(0, BLOCK_I))[None, :]
        inside = row_is[:, None] & (columns < width)
        gate = read(gate_PI, starts + columns, inside)
        up = read(up_PI, starts + columns, inside)
        act = gate * sigmoid(gate)
        lin = up
        if WITH_STATS:
            some = columns < sampled
            gate_up += tl.where(some, gate * up, 0.0)
            gate_square += tl.where(some, gate * gate, 0.0)
            up_square += tl.where(some, up * up, 0.0)
            # A column outside of the row reads as silu(0) = 0, which is not a value of the row.
            peak_gate = tl.maximum(peak_gate, tl.where(inside, act, float("-inf")))
            peak_up = tl.maximum(peak_up, tl.abs(up))
            gate_broken += tl.where(gate == gate, 0.0, float("nan"))
            up_broken += tl.where(up == up, 0.0, float("nan"))
        if HAS_LIMIT:
            if WITH_STATS:
                # Both counts are 0 outside of the row: silu(0) and 0 exceed no limit.
                clipped += tl.where(act > limit, 1.0, 0.0) + tl.where(tl.abs(up) > limit, 1.0, 0.0)
            act = _clip_above(act, limit)
            lin = -_clip_above(-_clip_above(up, limit), limit)
        product = act * lin
        if WITH_STATS:
            h_square += product * product
        tl.store(h_PI + starts + columns, (product * weights[:, None]).to(h_PI.dtype.element_ty), mask=inside)
    if WITH_STATS:  # in the order of SwigluRows
        gate_top = tl.max(peak_gate, axis=1)
        up_top = tl.max(peak_up, axis=1)
        # Maxima ignore a NaN, sums do not: a row with a NaN has a NaN peak.
        gate_mark = tl.sum(gate_broken, axis=1)
        up_mark = tl.sum(up_broken, axis=1)
        gate_top = tl.where(gate_mark == gate_mark, gate_top, gate_mark)
        up_top = tl.where(up_mark == up_mark, up_top, up_mark)
        tl.store(stats_SP + rows, tl.sum(h_square, axis=1), mask=row_is)
        tl.store(stats_SP + num_rows + rows, tl.sum(gate_up, axis=1), mask=row_is)
        tl.store(stats_SP + 2 * num_rows + rows, tl.sum(gate_square, axis=1), mask=row_is)
        tl.store(stats_SP + 3 * num_rows + rows, tl.sum(up_square, axis=1), mask=row_is)
        tl.store(stats_SP + 4 * num_rows + rows, gate_top, mask=row_is)
        tl.store(stats_SP + 5 * num_rows + rows, up_top, mask=row_is)
        tl.store(stats_SP + 6 * num_rows + rows, tl.sum(clipped, axis=1), mask=row_is)


@triton.jit
def _backward_kernel(
    grad_h_PI,
    gate_PI,
    up_PI,
    weights_P,
    grad_gate_PI,
    grad_up_PI,
    grad_weights_P,
    num_rows,
    width,
    limit,
    HAS_LIMIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    row_is = rows < num_rows
    starts = rows.to(tl.int64)[:, None] * width
    weights = tl.load(weights_P + rows, mask=row_is, other=0.0).to(tl.float32)
    grad_weights = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
    for first in range(0, width, BLOCK_I):
        columns = (first + tl.arange(0, BLOCK_I))[None, :]
        inside = row_is[:, None] & (columns < width)
        grad_h = read(grad_h_PI, starts + columns, inside)
        gate = read(gate_PI, starts + columns, inside)
        up = read(up_PI, starts + columns, inside)
        share = sigmoid(gate)
        free = gate * share
        act = free
        lin = up
        if HAS_LIMIT:
            act = _clip_above(free, limit)
            lin = -_clip_above(-_clip_above(up, limit), limit)
        grad_weights += act * lin * grad_h
        grad_product = grad_h * weights[:, None]
        grad_gate = grad_product * lin * (share + free * (1.0 - share))
        grad_up = grad_product * act
        if HAS_LIMIT:
            # An element exactly at the limit still passes the gradient.
            grad_gate = tl.where(free > limit, 0.0, grad_gate)
            grad_up = tl.where(tl.abs(up) > limit, 0.0, grad_up)
        tl.store(grad_gate_PI + starts + columns, grad_gate.to(grad_gate_PI.dtype.element_ty), mask=inside)
        tl.store(grad_up_PI + starts + columns, grad_up.to(grad_up_PI.dtype.element_ty), mask=inside)
    tl.store(grad_weights_P + rows, tl.sum(grad_weights, axis=1), mask=row_is)


def tile(width: int) -> tuple[int, int]:
    """Return the rows and columns of a program's tile, powers of two, for rows of `width` elements."""
    columns = min(BLOCK_I, power_of_two(width))
    return min(16, TILE // columns), columns


def _launch(
    kernel: Any, shape: torch.Size, tensors: tuple[Tensor | None, ...], limit: float | None, **flags: int
) -> None:
    """Run a kernel over all rows."""
    num_rows, width = shape
    rows, columns = tile(width)
    numbers, flags["HAS_LIMIT"] = (num_rows, width, float(limit or 0.0)), limit is not None
    sizes = {"BLOCK_P": rows, "BLOCK_I": columns}
    triton_launch.launch(kernel, blocks(num_rows, rows), tensors, *numbers, **sizes, **flags)


class _WeightedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_PI: Tensor, up_PI: Tensor, weights_P: Tensor, limit: float | None, seen_SP: Tensor | None
    ) -> Tensor:
        gate_PI, up_PI, weights_P = gate_PI.contiguous(), up_PI.contiguous(), weights_P.contiguous()
        h_PI = torch.empty_like(gate_PI)
        tensors = (gate_PI, up_PI, weights_P, h_PI, seen_SP)
        sampled = sampled_columns(gate_PI.shape[1])
        _launch(_forward_kernel, gate_PI.shape, tensors, limit, sampled=sampled, WITH_STATS=seen_SP is not None)
        ctx.save_for_backward(gate_PI, up_PI, weights_P)
        ctx.limit = limit
        return h_PI

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        gate_PI, up_PI, weights_P = ctx.saved_tensors
        found = (torch.empty_like(gate_PI), torch.empty_like(up_PI), torch.empty_like(weights_P))
        given = (grads[0].contiguous(), gate_PI, up_PI, weights_P)
        _launch(_backward_kernel, gate_PI.shape, given + found, ctx.limit)
        return *found, None, None


def triton_swiglu(
    gate_PI: Float[Tensor, "P I"],
    up_PI: Float[Tensor, "P I"],
    weights_P: Float[Tensor, "P"],
    limit: float | None,
    seen_SP: Float[Tensor, "S P"] | None,
) -> Float[Tensor, "P I"]:
    """Return min(silu(gate), L) · clamp(up, −L, L) · weight [P, I], in the dtype of `gate`.

    `gate` and `up` are bf16 or fp32, the weights fp32, all on one GPU. Without a limit nothing is clipped. The gradient
    is 0 where an element is beyond the limit, and passes where it is exactly at the limit; the gradient of the weights
    is fp32. Rows do not influence each other. Statistics of each row are written to `seen_SP` (fp32, contiguous, in the
    order of `SwigluRows`) unless it is None.
    """
    assert weights_P.dtype is torch.float32, f"the weights are {weights_P.dtype}, not float32"
    h_PI: Any = _WeightedSwiglu.apply(gate_PI, up_PI, weights_P, limit, seen_SP)
    return h_PI
