"""Rows of tokens on GPUs: the gather, the sum of each token's rows, and the plan of rows, without atomics or a sort.

    take     row p of the result is the token source[p]
    add up   the sum of each token's rows in the order of its slots, in fp32
    plan     counts by block of choices ─ sums before each block ─ rows: groups, blocks and choices before

Numbers that follow the routing are not specialised: a kernel is not compiled again for those that 16 divides.

Importing this module requires Triton. The tests run the kernels under Triton's interpreter and compile them for sm_90.
They have not run on a GPU; tile sizes are estimates, not tuned.

Legend: N tokens, D hidden, K choices a token, M = N·K, P rows, S slots of all tokens, E experts (and one more for
choices elsewhere), B blocks of choices. In kernels the suffix is that of the tensor to which a pointer leads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from steptron.moe.dispatch import ROW_MULTIPLE, ExpertRows, Plan, RowMoves, most_rows
from steptron.nn import triton_launch
from steptron.nn.triton_launch import block_of_rows, blocks, power_of_two, warps

TILE = 2048
"""The number of elements that a program moves at a time."""
PLANNED = 8192
"""The number of (choice, expert) pairs of a tile of the plan."""


@triton.jit(do_not_specialize=["num_rows"])
def _take_kernel(x_ND, source_P, rows_PD, num_rows, width, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    row_is = rows < num_rows
    # The tokens' numbers have 64 bits, and so have places: P · D exceeds 2³¹.
    tokens = tl.load(source_P + rows, mask=row_is, other=0)[:, None] * width
    starts = rows.to(tl.int64)[:, None] * width
    for first in range(0, width, BLOCK_D):
        columns = (first + tl.arange(0, BLOCK_D))[None, :]
        inside = row_is[:, None] & (columns < width)
        tl.store(rows_PD + starts + columns, tl.load(x_ND + tokens + columns, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "nobody"])
def _add_up_kernel(
    y_PD,
    slots_S,
    starts_N,
    sum_ND,
    num_tokens,
    num_slots,
    width,
    top_k,
    nobody,
    RAGGED: tl.constexpr,
    HAS_NOBODY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first = token * top_k
    last = first + top_k
    if RAGGED:
        first = tl.load(starts_N + token)
        last = tl.load(starts_N + token + 1, mask=token + 1 < num_tokens, other=num_slots)
    for start in range(0, width, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < width
        total = tl.zeros([BLOCK_D], tl.float32)
        for slot in range(first, last):
            row = tl.load(slots_S + slot)
            read = inside
            if HAS_NOBODY:
                # It is not read, because it may be NaN.
                read = inside & (row != nobody)
            total += tl.load(y_PD + row * width + columns, mask=read, other=0.0).to(tl.float32)
        tl.store(sum_ND + token * width + columns, total.to(sum_ND.dtype.element_ty), mask=inside)


@triton.jit
def _one_hot(experts_M, choices, num_choices, num_experts, HAS_ELSEWHERE: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return 1 for the expert of each choice [choices, E], int32. Choices elsewhere follow the last expert."""
    inside = choices < num_choices
    expert = tl.load(experts_M + choices, mask=inside, other=0).to(tl.int32)
    if HAS_ELSEWHERE:
        expert = tl.where(expert < 0, num_experts, expert)
    return ((expert[:, None] == tl.arange(0, BLOCK_E)[None, :]) & inside[:, None]).to(tl.int32)


@triton.jit(do_not_specialize=["num_choices"])
def _count_kernel(
    experts_M,
    counts_BE,
    num_choices,
    num_experts,
    HAS_ELSEWHERE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    choices = block * BLOCK_M + tl.arange(0, BLOCK_M)
    chosen = _one_hot(experts_M, choices, num_choices, num_experts, HAS_ELSEWHERE, BLOCK_E)
    tl.store(counts_BE + block * BLOCK_E + tl.arange(0, BLOCK_E), tl.sum(chosen, axis=0))


@triton.jit(do_not_specialize=["num_choices", "num_rows"])
def _place_kernel(
    experts_M,
    sums_BE,
    totals_E,
    source_P,
    slots_M,
    groups_E,
    counts_E,
    elsewhere_M,
    num_choices,
    num_experts,
    top_k,
    num_rows,
    MULTIPLE: tl.constexpr,
    HAS_ELSEWHERE: tl.constexpr,
    FILL_EMPTY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    real = experts < num_experts
    counts = tl.load(totals_E + experts)
    least = counts
    if FILL_EMPTY:
        least = tl.maximum(counts, 1)
    groups = tl.where(real, (least + (MULTIPLE - 1)) // MULTIPLE * MULTIPLE, 0)
    before = tl.load(sums_BE + (block - 1) * BLOCK_E + experts, mask=(block > 0) & (experts >= 0), other=0)
    starts = tl.cumsum(groups, axis=0) - groups + before
    choices = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = choices < num_choices
    chosen = _one_hot(experts_M, choices, num_choices, num_experts, HAS_ELSEWHERE, BLOCK_E)
    slots = tl.sum(chosen * (starts[None, :] + tl.cumsum(chosen, axis=0) - 1), axis=1).to(tl.int64)
    here = inside
    if HAS_ELSEWHERE:
        gone = tl.load(experts_M + choices, mask=inside, other=0) < 0
        slots = tl.where(gone, num_rows - 1, slots)
        here = inside & (gone == 0)
        tl.store(elsewhere_M + choices, gone.to(tl.uint8), mask=inside)
    tl.store(slots_M + choices, slots, mask=inside)
    tl.store(source_P + slots, choices // top_k, mask=here)
    if block == 0:
        tl.store(groups_E + experts, groups.to(tl.int64), mask=real)
        tl.store(counts_E + experts, counts.to(tl.int64), mask=real)


def _take(x_ND: Tensor, source_P: Tensor) -> Tensor:
    x_ND, source_P, (num_rows,), width = x_ND.contiguous(), source_P.contiguous(), source_P.shape, x_ND.shape[1]
    rows_PD = x_ND.new_empty(num_rows, width)
    rows, columns = block_of_rows(width, TILE), min(power_of_two(width), TILE)
    sizes = {"BLOCK_P": rows, "BLOCK_D": columns, "num_warps": warps(rows * columns)}
    triton_launch.launch(_take_kernel, blocks(num_rows, rows), (x_ND, source_P, rows_PD), num_rows, width, **sizes)
    return rows_PD


def _add_up(y_PD: Tensor, rows: ExpertRows) -> Tensor:
    y_PD, ragged = y_PD.contiguous(), rows.starts_N is not None
    tokens, width = len(rows.slots) if rows.starts_N is None else len(rows.starts_N), y_PD.shape[1]
    sum_ND, columns = y_PD.new_empty(tokens, width), min(power_of_two(width), TILE)
    top_k = 0 if ragged else rows.slots.shape[1]
    numbers = (tokens, rows.slots.numel(), width, top_k, -1 if rows.nobody is None else rows.nobody)
    tensors = (y_PD, rows.slots.contiguous(), rows.starts_N, sum_ND)
    constants = {"RAGGED": ragged, "HAS_NOBODY": rows.nobody is not None, "BLOCK_D": columns}
    triton_launch.launch(_add_up_kernel, tokens, tensors, *numbers, **constants, num_warps=warps(columns))
    return sum_ND


BY_TRITON = RowMoves(_take, _add_up)
"""The moves of rows by the kernels of this module."""


def plan_rows_on_device(experts_NK: Tensor, num_experts: int, num_here: int | None, fill_empty: bool) -> Plan:
    """Return what `plan_rows` does if it is not exact: the largest number of rows, and no wait of the host.

    The last row of a plan with choices elsewhere, which belongs to no group, repeats token 0.
    """
    (tokens, top_k), experts_NK = experts_NK.shape, experts_NK.contiguous()
    choices, with_elsewhere = tokens * top_k, num_here is not None and tokens * top_k > 0
    num_rows = most_rows(choices if num_here is None else num_here, num_experts, fill_empty)
    num_rows += ROW_MULTIPLE * with_elsewhere
    width = power_of_two(num_experts + 1)
    sizes = {"BLOCK_M": block_of_rows(width, PLANNED), "BLOCK_E": width}
    num_blocks = blocks(choices, sizes["BLOCK_M"])
    source_P, slots_NK = experts_NK.new_zeros(num_rows), torch.empty_like(experts_NK)
    if not num_blocks:
        groups_E = experts_NK.new_full((num_experts,), ROW_MULTIPLE * fill_empty)
        return Plan(ExpertRows(source_P, slots_NK), slots_NK, groups_E, torch.zeros_like(groups_E))
    counts_BE = torch.empty(num_blocks, width, dtype=torch.int32, device=experts_NK.device)
    constants = {"HAS_ELSEWHERE": with_elsewhere, **sizes, "num_warps": 8}
    triton_launch.launch(_count_kernel, num_blocks, (experts_NK, counts_BE), choices, num_experts, **constants)
    sums_BE = counts_BE.cumsum(0, dtype=torch.int32)
    groups_E, counts_E = experts_NK.new_empty(2, num_experts)
    elsewhere_NK = torch.empty_like(experts_NK, dtype=torch.uint8) if with_elsewhere else None
    tensors = (experts_NK, sums_BE, sums_BE[-1], source_P, slots_NK, groups_E, counts_E, elsewhere_NK)
    numbers = (choices, num_experts, top_k, num_rows)
    constants |= {"MULTIPLE": ROW_MULTIPLE, "FILL_EMPTY": fill_empty}
    triton_launch.launch(_place_kernel, num_blocks, tensors, *numbers, **constants)
    if elsewhere_NK is None:
        return Plan(ExpertRows(source_P, slots_NK), slots_NK, groups_E, counts_E)
    rows = ExpertRows(source_P, slots_NK, nobody=num_rows - 1)
    return Plan(rows, slots_NK, groups_E, counts_E, elsewhere_NK.view(torch.bool))
