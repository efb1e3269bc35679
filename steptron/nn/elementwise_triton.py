"""Norm, q/k norm with RoPE, and gates of heads on GPUs: one kernel each forward, and one backward.

    norm   y = x · r · (1 + w), r = rsqrt(mean(x²) + eps)
    turn   the norm of each head, then its rotation
    gate   y = o · sigmoid(g), with one g for each head

Backward computes r again, because it reads the row anyway. The gradient of a weight is a sum over all rows: each
program adds up consecutive rows and writes one partial sum, and a second kernel adds these in order. So there are no
atomics, and the same bits each time. Arithmetic is fp32; tensors keep the caller's dtype.

Importing this module requires Triton. The tests run the kernels under Triton's interpreter and compile them for sm_90.
They have not run on a GPU; tile sizes are estimates, not tuned.

Legend: N tokens, H heads, A head_dim, R rotated planes, M rows (of the norm; N · H of heads), D channels of a row, G
programs, * any leading dims. In kernels the suffix is that of the tensor to which a pointer leads.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from steptron.nn import triton_launch
from steptron.nn.triton_launch import block_of_rows, blocks, power_of_two, shares, warps
from steptron.nn.triton_parts import over_programs, read, sigmoid, write

TILE = 2048
"""The number of elements of a tile; rows that are longer are a tile each."""


@triton.jit
def _norm_kernel(x_MD, weight_D, y_MD, num_rows, width, eps, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    # 64 bits, because M · D exceeds 2³¹.
    places = rows.to(tl.int64)[:, None] * width + columns[None, :]
    x = read(x_MD, places, inside)
    scale = 1.0 + read(weight_D, columns, columns < width)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    write(y_MD, places, x * inverse[:, None] * scale[None, :], inside)


@triton.jit
def _norm_backward_kernel(
    grad_MD,
    x_MD,
    weight_D,
    grad_x_MD,
    partial_GD,
    num_rows,
    rows_each,
    width,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) * rows_each
    columns = tl.arange(0, BLOCK_D)
    scale = 1.0 + read(weight_D, columns, columns < width)
    grad_weight = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, rows_each, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
        places = rows.to(tl.int64)[:, None] * width + columns[None, :]
        x = read(x_MD, places, inside)
        grad = read(grad_MD, places, inside)
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
        scaled = grad * scale[None, :]
        # dx = r·g·(1 + w) − x·r³·mean(x·g·(1 + w))
        mean = tl.sum(x * scaled, axis=1) / width * inverse * inverse * inverse
        write(grad_x_MD, places, scaled * inverse[:, None] - x * mean[:, None], inside)
        grad_weight += tl.sum(grad * x * inverse[:, None], axis=0)
    place = tl.program_id(0).to(tl.int64) * width
    tl.store(partial_GD + place + columns, grad_weight, mask=columns < width)


@triton.jit
def _normalised_by(x_MA, starts, plane, rest, turned, kept, planes, width, eps):
    """Return the channels of each row that turn as first and second of a plane, those that do not, and the inverse of
    the row's norm [rows, 1]."""
    first = read(x_MA, starts + plane, turned)
    second = read(x_MA, starts + planes + plane, turned)
    third = read(x_MA, starts + rest, kept)
    square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1) + tl.sum(third * third, axis=1)
    return first, second, third, tl.rsqrt(square / width + eps)[:, None]


@triton.jit
def _turn_kernel(
    x_MA,
    weight_A,
    cos_NR,
    sin_NR,
    y_MA,
    num_rows,
    heads,
    width,
    planes,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_is = (rows < num_rows)[:, None]
    starts = rows.to(tl.int64)[:, None] * width
    plane = tl.arange(0, BLOCK_R)[None, :]
    turned = row_is & (plane < planes)
    rest = 2 * planes + tl.arange(0, BLOCK_REST)[None, :]  # channels that are not turned
    kept = row_is & (rest < width)
    row = _normalised_by(x_MA, starts, plane, rest, turned, kept, planes, width, eps)
    first, second, third, inverse = row  # pyright: ignore
    first *= inverse * (1.0 + read(weight_A, plane, plane < planes))
    second *= inverse * (1.0 + read(weight_A, planes + plane, plane < planes))
    third *= inverse * (1.0 + read(weight_A, rest, rest < width))
    angles = (rows // heads).to(tl.int64)[:, None] * planes + plane
    cos = read(cos_NR, angles, turned)
    sin = read(sin_NR, angles, turned)
    write(y_MA, starts + plane, first * cos - second * sin, turned)
    write(y_MA, starts + planes + plane, second * cos + first * sin, turned)
    write(y_MA, starts + rest, third, kept)


@triton.jit
def _turn_backward_kernel(
    grad_MA,
    x_MA,
    weight_A,
    cos_NR,
    sin_NR,
    grad_x_MA,
    partial_GA,
    num_rows,
    rows_each,
    heads,
    width,
    planes,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    plane = tl.arange(0, BLOCK_R)[None, :]
    rest = 2 * planes + tl.arange(0, BLOCK_REST)[None, :]
    first_scale = 1.0 + read(weight_A, plane, plane < planes)
    second_scale = 1.0 + read(weight_A, planes + plane, plane < planes)
    third_scale = 1.0 + read(weight_A, rest, rest < width)
    first_weight = tl.zeros([BLOCK_R], tl.float32)
    second_weight = tl.zeros([BLOCK_R], tl.float32)
    third_weight = tl.zeros([BLOCK_REST], tl.float32)
    for start in range(0, rows_each, BLOCK_M):
        rows = tl.program_id(0) * rows_each + start + tl.arange(0, BLOCK_M)
        row_is = (rows < num_rows)[:, None]
        starts = rows.to(tl.int64)[:, None] * width
        turned = row_is & (plane < planes)
        kept = row_is & (rest < width)
        row = _normalised_by(x_MA, starts, plane, rest, turned, kept, planes, width, eps)
        first, second, third, inverse = row  # pyright: ignore
        angles = (rows // heads).to(tl.int64)[:, None] * planes + plane
        cos = read(cos_NR, angles, turned)
        sin = read(sin_NR, angles, turned)
        # The inverse of a rotation is the rotation in the opposite direction.
        up = read(grad_MA, starts + plane, turned)
        down = read(grad_MA, starts + planes + plane, turned)
        first_grad = up * cos + down * sin
        second_grad = down * cos - up * sin
        third_grad = read(grad_MA, starts + rest, kept)
        first_weight += tl.sum(first_grad * first * inverse, axis=0)
        second_weight += tl.sum(second_grad * second * inverse, axis=0)
        third_weight += tl.sum(third_grad * third * inverse, axis=0)
        first_grad *= first_scale
        second_grad *= second_scale
        third_grad *= third_scale
        total = tl.sum(first * first_grad, axis=1) + tl.sum(second * second_grad, axis=1)
        total += tl.sum(third * third_grad, axis=1)
        mean = (total / width)[:, None] * inverse * inverse * inverse
        write(grad_x_MA, starts + plane, first_grad * inverse - first * mean, turned)
        write(grad_x_MA, starts + planes + plane, second_grad * inverse - second * mean, turned)
        write(grad_x_MA, starts + rest, third_grad * inverse - third * mean, kept)
    place = tl.program_id(0) * width
    planes_1 = tl.arange(0, BLOCK_R)
    rest_1 = 2 * planes + tl.arange(0, BLOCK_REST)
    tl.store(partial_GA + place + planes_1, first_weight, mask=planes_1 < planes)
    tl.store(partial_GA + place + planes + planes_1, second_weight, mask=planes_1 < planes)
    tl.store(partial_GA + place + rest_1, third_weight, mask=rest_1 < width)


@triton.jit
def _gate_kernel(o_MA, gate_M, y_MA, num_rows, width, BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_A)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    places = rows.to(tl.int64)[:, None] * width + columns[None, :]
    share = sigmoid(read(gate_M, rows, rows < num_rows))
    write(y_MA, places, read(o_MA, places, inside) * share[:, None], inside)


@triton.jit
def _gate_backward_kernel(
    grad_MA, o_MA, gate_M, grad_o_MA, grad_gate_M, num_rows, width, BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_A)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    places = rows.to(tl.int64)[:, None] * width + columns[None, :]
    share = sigmoid(read(gate_M, rows, rows < num_rows))
    grad = read(grad_MA, places, inside)
    grad_share = tl.sum(grad * read(o_MA, places, inside), axis=1)
    write(grad_o_MA, places, grad * share[:, None], inside)
    write(grad_gate_M, rows, grad_share * share * (1.0 - share), rows < num_rows)


def _tile(width: int) -> dict[str, int]:
    """Return the tile of a kernel that holds complete rows of this width, and its warps."""
    rows, columns = block_of_rows(width, TILE), power_of_two(width)
    return {"BLOCK_M": rows, "BLOCK_D": columns, "num_warps": warps(rows * columns)}


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x, weight_D, width = x.contiguous(), weight_D.contiguous(), x.shape[-1]
        y, rows, sizes = torch.empty_like(x), x.numel() // width, _tile(width)
        programs = blocks(rows, sizes["BLOCK_M"])
        triton_launch.launch(_norm_kernel, programs, (x, weight_D, y), rows, width, eps, **sizes)
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D = ctx.saved_tensors
        width, grad_x = x.shape[-1], torch.empty_like(x)
        rows, sizes = x.numel() // width, _tile(width)
        programs, each = shares(rows, sizes["BLOCK_M"])
        partial_GD = x.new_empty(programs, width, dtype=torch.float32)
        tensors = (grads[0].contiguous(), x, weight_D, grad_x, partial_GD)
        triton_launch.launch(_norm_backward_kernel, programs, tensors, rows, each, width, ctx.eps, **sizes)
        return grad_x, over_programs(partial_GD, width, weight_D.dtype), None


def _turned_tile(width: int, planes: int) -> dict[str, int]:
    rows = block_of_rows(width, TILE)
    rest = power_of_two(width - 2 * planes)
    return {
        "BLOCK_M": rows,
        "BLOCK_R": power_of_two(planes),
        "BLOCK_REST": rest,
        "num_warps": warps(rows * power_of_two(width)),
    }


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NHA: Tensor, weight_A: Tensor, cos_NR: Tensor, sin_NR: Tensor, eps: float) -> Tensor:
        x_NHA, weight_A, cos_NR, sin_NR = (t.contiguous() for t in (x_NHA, weight_A, cos_NR, sin_NR))
        y_NHA, (tokens, heads, width), planes = torch.empty_like(x_NHA), x_NHA.shape, cos_NR.shape[1]
        rows, sizes = tokens * heads, _turned_tile(width, planes)
        tensors = (x_NHA, weight_A, cos_NR, sin_NR, y_NHA)
        programs = blocks(rows, sizes["BLOCK_M"])
        triton_launch.launch(_turn_kernel, programs, tensors, rows, heads, width, planes, eps, **sizes)
        ctx.save_for_backward(x_NHA, weight_A, cos_NR, sin_NR)
        ctx.eps = eps
        return y_NHA

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x_NHA, weight_A, cos_NR, sin_NR = ctx.saved_tensors
        (tokens, heads, width), planes = x_NHA.shape, cos_NR.shape[1]
        rows, sizes = tokens * heads, _turned_tile(width, planes)
        programs, each = shares(rows, sizes["BLOCK_M"])
        grad_x_NHA = torch.empty_like(x_NHA)
        partial_GA = x_NHA.new_empty(programs, width, dtype=torch.float32)
        tensors = (grads[0].contiguous(), x_NHA, weight_A, cos_NR, sin_NR, grad_x_NHA, partial_GA)
        numbers = (rows, each, heads, width, planes, ctx.eps)
        triton_launch.launch(_turn_backward_kernel, programs, tensors, *numbers, **sizes)
        return grad_x_NHA, over_programs(partial_GA, width, weight_A.dtype), None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o_NHA: Tensor, gate_NH: Tensor) -> Tensor:
        o_NHA, gate_NH = o_NHA.contiguous(), gate_NH.contiguous()
        y_NHA = torch.empty_like(o_NHA)
        _launch_gate(_gate_kernel, (o_NHA, gate_NH, y_NHA))
        ctx.save_for_backward(o_NHA, gate_NH)
        return y_NHA

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        o_NHA, gate_NH = ctx.saved_tensors
        grad_o_NHA, grad_gate_NH = torch.empty_like(o_NHA), torch.empty_like(gate_NH)
        _launch_gate(_gate_backward_kernel, (grads[0].contiguous(), o_NHA, gate_NH, grad_o_NHA, grad_gate_NH))
        return grad_o_NHA, grad_gate_NH


def _launch_gate(kernel: Any, tensors: tuple[Tensor, ...]) -> None:
    tokens, heads, width = tensors[0].shape
    rows = block_of_rows(width, TILE)
    sizes = {"BLOCK_M": rows, "BLOCK_A": power_of_two(width), "num_warps": warps(rows * power_of_two(width))}
    triton_launch.launch(kernel, blocks(tokens * heads, rows), tensors, tokens * heads, width, **sizes)


def triton_norm(x: Float[Tensor, "*rows D"], weight_D: Float[Tensor, "D"], eps: float) -> Float[Tensor, "*rows D"]:
    """Return `x · rsqrt(mean(x²) + eps) · (1 + weight)` over the last dim, as `nn/norm.py` does, in `x`'s dtype.

    `x` is bf16 or fp32. A tile holds complete rows. Rows do not influence each other.
    """
    y: Any = _Norm.apply(x, weight_D, eps)
    return y


def triton_turn(
    x_NHA: Float[Tensor, "N H A"],
    weight_A: Float[Tensor, "A"],
    eps: float,
    cos_NR: Float[Tensor, "N R"],
    sin_NR: Float[Tensor, "N R"],
) -> Float[Tensor, "N H A"]:
    """Return the norm of each head, whose first 2R channels are then turned by the angles of their token.

    It differs from `nn/attention.py` in that nothing is rounded between the two. The tables are fp32.
    """
    y_NHA: Any = _Turn.apply(x_NHA, weight_A, cos_NR, sin_NR, eps)
    return y_NHA


def triton_gate(o_NHA: Float[Tensor, "N H A"], gate_NH: Float[Tensor, "N H"]) -> Float[Tensor, "N H A"]:
    """Return each head's output times the sigmoid of its gate, which is not rounded before it multiplies."""
    y_NHA: Any = _Gate.apply(o_NHA, gate_NH)
    return y_NHA
