"""The statistics of a MoE layer on GPUs: one kernel that reads, and one that adds up what its programs found.

    router, shared expert, norms   programs read rows in turn ─→ partial [G, C] ─→ found [C]
    experts                        norms of results by row; then one program for each expert reads its rows

So no statistic needs atomics, and each has the same bits every time. Arithmetic is fp32. The values are those of
`stats.py`, with two differences in bf16: norms are not rounded before they are added, and neither is anything else.

Importing this module requires Triton. The tests run the kernels under Triton's interpreter and compile them for sm_90.
They have not run on a GPU; tile sizes are estimates, not tuned.

Legend: N tokens, K choices a token, E experts, P rows, D hidden, F figures of an expert, G programs, C columns of a
partial result, X elements. In kernels the suffix is that of the tensor to which a pointer leads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from steptron.moe.dispatch import Plan
from steptron.moe.router import Routing
from steptron.moe.stats import ExpertStats, RouterStats, RowStats, SharedStats
from steptron.nn import triton_launch
from steptron.nn.triton_launch import block_of_rows, blocks, power_of_two, shares, warps
from steptron.nn.triton_parts import nan_mark, or_nan, over_programs, read, sigmoid

TILE = 2048
"""The number of elements of a tile."""
BLOCK_ROWS = 256
"""The rows of an expert that are read at a time."""


@triton.jit
def _router_kernel(
    p_NE,
    logits_NE,
    experts_NK,
    bias_E,
    partial_GC,
    num_tokens,
    tokens_each,
    num_experts,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_E)
    expert_is = columns < num_experts
    bias = read(bias_E, columns, expert_is)
    mass = tl.zeros([BLOCK_E], tl.float32)
    confidence = tl.zeros([BLOCK_N], tl.float32)
    entropy = tl.zeros([BLOCK_N], tl.float32)
    margin = tl.zeros([BLOCK_N], tl.float32)
    peak = tl.zeros([BLOCK_N], tl.float32)
    broken = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, tokens_each, BLOCK_N):
        tokens = (tl.program_id(0) * tokens_each + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        token_is = tokens < num_tokens
        inside = token_is[:, None] & expert_is[None, :]
        places = tokens[:, None] * num_experts + columns[None, :]
        p = read(p_NE, places, inside)
        total = tl.where(token_is, tl.sum(p, axis=1), 1.0)
        scale = 1.0 / (total + 1e-20)
        # Σ_e (p/s) ln(p/s) = (Σ_e p ln p)/s − ln s where s = Σ_e p. A p of 0 adds 0.
        plogp = tl.sum(tl.where(p > 0.0, p * tl.log(tl.where(p > 0.0, p, 1.0)), p), axis=1)
        selected = tl.zeros([BLOCK_N, BLOCK_E], tl.int32)
        sure = tl.zeros([BLOCK_N], tl.float32)
        lowest = tl.full([BLOCK_N], float("inf"), tl.float32)
        for k in range(TOP_K):
            expert = tl.load(experts_NK + tokens * TOP_K + k, mask=token_is, other=0)
            chosen = read(p_NE, tokens * num_experts + expert, token_is)
            sure += chosen
            lowest = tl.minimum(lowest, chosen + tl.load(bias_E + expert))
            selected += (columns[None, :] == expert[:, None]).to(tl.int32)
        other = tl.where((selected == 0) & inside, p + bias[None, :], float("-inf"))
        gap = lowest - tl.max(other, axis=1)
        gap = or_nan(gap, tl.sum(nan_mark(p + bias[None, :]), axis=1))
        mass += tl.sum(tl.where(inside, p * scale[:, None], 0.0), axis=0)
        confidence += tl.where(token_is, sure * scale, 0.0)
        entropy += tl.where(token_is, tl.log(total) * total * scale - plogp * scale, 0.0)
        margin += tl.where(token_is, gap, 0.0)
        logits = read(logits_NE, places, inside)
        peak = tl.maximum(peak, tl.max(tl.abs(logits), axis=1))
        broken += tl.sum(nan_mark(logits), axis=1)
    place = partial_GC + tl.program_id(0) * (num_experts + 4)
    tl.store(place + columns, mass, mask=expert_is)
    tl.store(place + num_experts, tl.sum(confidence, axis=0))
    tl.store(place + num_experts + 1, tl.sum(entropy, axis=0))
    tl.store(place + num_experts + 2, tl.sum(margin, axis=0))
    tl.store(place + num_experts + 3, or_nan(tl.max(peak, axis=0), tl.sum(broken, axis=0)))


@triton.jit
def _shared_kernel(
    gate_X,
    up_X,
    partial_GC,
    num_elements,
    elements_each,
    limit,
    HAS_LIMIT: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * elements_each
    clipped = tl.zeros([BLOCK_X], tl.float32)
    peak_gate = tl.zeros([BLOCK_X], tl.float32)
    peak_up = tl.zeros([BLOCK_X], tl.float32)
    gate_broken = tl.zeros([BLOCK_X], tl.float32)
    up_broken = tl.zeros([BLOCK_X], tl.float32)
    for start in range(0, elements_each, BLOCK_X):
        places = first + start + tl.arange(0, BLOCK_X)
        gate = read(gate_X, places, places < num_elements)
        up = read(up_X, places, places < num_elements)
        act = gate * sigmoid(gate)
        size = tl.abs(up)
        peak_gate = tl.maximum(peak_gate, act)
        peak_up = tl.maximum(peak_up, size)
        gate_broken += nan_mark(gate)
        up_broken += nan_mark(up)
        if HAS_LIMIT:
            # The product clips what silu has rounded to the dtype of `gate`.
            rounded = act.to(gate_X.dtype.element_ty).to(tl.float32)
            clipped += tl.where(rounded > limit, 1.0, 0.0) + tl.where(size > limit, 1.0, 0.0)
    place = partial_GC + tl.program_id(0) * 3
    tl.store(place, tl.sum(clipped, axis=0))
    tl.store(place + 1, or_nan(tl.max(peak_gate, axis=0), tl.sum(gate_broken, axis=0)))
    tl.store(place + 2, or_nan(tl.max(peak_up, axis=0), tl.sum(up_broken, axis=0)))


@triton.jit
def _row_norms(values_PD, rows, num_rows, width, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the Euclidean norm of each row [rows]; 0 after the last one."""
    square = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for first in range(0, width, BLOCK_D):
        columns = (first + tl.arange(0, BLOCK_D))[None, :]
        inside = (rows < num_rows)[:, None] & (columns < width)
        values = read(values_PD, rows.to(tl.int64)[:, None] * width + columns, inside)
        square += values * values
    return tl.sqrt(tl.sum(square, axis=1))


@triton.jit
def _norms_kernel(
    routed_ND,
    shared_ND,
    partial_GC,
    num_rows,
    rows_each,
    width,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    routed = tl.zeros([BLOCK_P], tl.float32)
    shared = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, rows_each, BLOCK_P):
        rows = tl.program_id(0) * rows_each + start + tl.arange(0, BLOCK_P)
        routed += _row_norms(routed_ND, rows, num_rows, width, BLOCK_P, BLOCK_D)
        shared += _row_norms(shared_ND, rows, num_rows, width, BLOCK_P, BLOCK_D)
    tl.store(partial_GC + tl.program_id(0) * 2, tl.sum(routed, axis=0))
    tl.store(partial_GC + tl.program_id(0) * 2 + 1, tl.sum(shared, axis=0))


# The number of rows follows the routing: the kernel is not compiled again if 16 divides it.
@triton.jit(do_not_specialize=["num_rows"])
def _out_norms_kernel(result_PD, weights_P, norms_P, num_rows, width, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    weights = read(weights_P, rows, rows < num_rows)
    norms = _row_norms(result_PD, rows, num_rows, width, BLOCK_P, BLOCK_D)
    norms = tl.where(weights > 0.0, norms / tl.where(weights > 0.0, weights, 1.0), 0.0)
    tl.store(norms_P + rows, norms, mask=rows < num_rows)


@triton.jit
def _by_expert_kernel(
    h_square_P,
    gate_up_P,
    gate_square_P,
    up_square_P,
    out_norm_P,
    clipped_P,
    peak_gate_P,
    peak_up_P,
    groups_E,
    counts_E,
    found_FE,
    num_experts,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    first = tl.sum(tl.load(groups_E + experts, mask=experts < expert, other=0), axis=0)
    count = tl.load(counts_E + expert)
    h_square = tl.zeros([BLOCK_P], tl.float32)
    gate_up = tl.zeros([BLOCK_P], tl.float32)
    gate_square = tl.zeros([BLOCK_P], tl.float32)
    up_square = tl.zeros([BLOCK_P], tl.float32)
    out_norm = tl.zeros([BLOCK_P], tl.float32)
    clipped = tl.zeros([BLOCK_P], tl.float32)
    peak_gate = tl.zeros([BLOCK_P], tl.float32)
    peak_up = tl.zeros([BLOCK_P], tl.float32)
    gate_broken = tl.zeros([BLOCK_P], tl.float32)
    up_broken = tl.zeros([BLOCK_P], tl.float32)
    # Padding comes last in a group, and is not read.
    for start in range(0, count, BLOCK_P):
        inside = start + tl.arange(0, BLOCK_P) < count
        rows = first + start + tl.arange(0, BLOCK_P)
        h_square += read(h_square_P, rows, inside)
        gate_up += read(gate_up_P, rows, inside)
        gate_square += read(gate_square_P, rows, inside)
        up_square += read(up_square_P, rows, inside)
        out_norm += read(out_norm_P, rows, inside)
        clipped += read(clipped_P, rows, inside)
        gate = read(peak_gate_P, rows, inside)
        up = read(peak_up_P, rows, inside)
        peak_gate = tl.maximum(peak_gate, gate)
        peak_up = tl.maximum(peak_up, up)
        gate_broken += nan_mark(gate)
        up_broken += nan_mark(up)
    place = found_FE + expert  # in the order of ExpertStats
    tl.store(place, count.to(tl.float32))
    tl.store(place + num_experts, tl.sum(h_square, axis=0))
    tl.store(place + 2 * num_experts, tl.sum(gate_up, axis=0))
    tl.store(place + 3 * num_experts, tl.sum(gate_square, axis=0))
    tl.store(place + 4 * num_experts, tl.sum(up_square, axis=0))
    tl.store(place + 5 * num_experts, tl.sum(out_norm, axis=0))
    tl.store(place + 6 * num_experts, tl.sum(clipped, axis=0))
    tl.store(place + 7 * num_experts, or_nan(tl.max(peak_gate, axis=0), tl.sum(gate_broken, axis=0)))
    tl.store(place + 8 * num_experts, or_nan(tl.max(peak_up, axis=0), tl.sum(up_broken, axis=0)))


def _partial(like: Tensor, programs: int, width: int) -> Tensor:
    """Return space for partial results; zeros of one program if there is nothing to read."""
    make = like.new_empty if programs else like.new_zeros
    return make(max(programs, 1), width, dtype=torch.float32)


def _tile(width: int) -> dict[str, int]:
    rows, columns = block_of_rows(width, TILE), min(power_of_two(width), TILE)
    return {"BLOCK_P": rows, "BLOCK_D": columns, "num_warps": warps(rows * columns)}


@torch.no_grad()
def router_stats(routing: Routing, bias_E: Tensor) -> RouterStats:
    """Return the statistics of a routing; `bias_E` is the bias that the routing was made with."""
    p_NE, logits_NE, experts_NK = (
        t.contiguous() for t in (routing.probabilities_NE, routing.logits_NE, routing.experts_NK)
    )
    (tokens, experts), top_k = p_NE.shape, experts_NK.shape[1]
    width = power_of_two(experts)
    rows = min(block_of_rows(width, 2 * TILE), 16)
    programs, each = shares(tokens, rows)
    partial_GC = _partial(p_NE, programs, experts + 4)
    sizes = {"TOP_K": top_k, "BLOCK_N": rows, "BLOCK_E": width, "num_warps": warps(rows * width)}
    tensors = (p_NE, logits_NE, experts_NK, bias_E.contiguous(), partial_GC)
    triton_launch.launch(_router_kernel, programs, tensors, tokens, each, experts, **sizes)
    found_C = over_programs(partial_GC, experts + 3)
    confidence, entropy, margin, logit_max = found_C[experts:].unbind()
    return RouterStats(tokens, found_C[:experts], confidence, entropy, margin, logit_max)


@torch.no_grad()
def out_norms(result_PD: Tensor, weights_P: Tensor) -> Tensor:
    """Return the norm of each row of the result without the weight of its choice [P], fp32; 0 where that is 0."""
    result_PD, weights_P = result_PD.contiguous(), weights_P.contiguous()
    norms_P, (rows, width) = torch.empty_like(weights_P), result_PD.shape
    sizes = _tile(width)
    programs = blocks(rows, sizes["BLOCK_P"])
    triton_launch.launch(_out_norms_kernel, programs, (result_PD, weights_P, norms_P), rows, width, **sizes)
    return norms_P


@torch.no_grad()
def by_expert(rows: RowStats, plan: Plan) -> ExpertStats:
    """Return the sums and maxima over the rows of each expert."""
    swiglu, experts = rows.swiglu, len(plan.groups_E)
    of_rows = (swiglu.h_square, swiglu.gate_up, swiglu.gate_square, swiglu.up_square, rows.out_norm, swiglu.clipped)
    of_rows = tuple(t.contiguous() for t in (*of_rows, swiglu.peak_gate, swiglu.peak_up))
    found_FE = of_rows[0].new_empty(len(ExpertStats._fields), experts)
    sizes = {"BLOCK_P": BLOCK_ROWS, "BLOCK_E": power_of_two(experts)}
    tensors = (*of_rows, plan.groups_E, plan.counts_E, found_FE)
    triton_launch.launch(_by_expert_kernel, experts, tensors, experts, **sizes)
    return ExpertStats(*found_FE.unbind(0))


@torch.no_grad()
def shared_stats(gate: Tensor, up: Tensor, limit: float | None) -> SharedStats:
    """Return the statistics of the shared expert from its gate and up [..., I] before clipping."""
    gate, up = gate.contiguous(), up.contiguous()
    programs, each = shares(gate.numel(), TILE)
    partial_GC = _partial(gate, programs, 3)
    constants = {"HAS_LIMIT": limit is not None, "BLOCK_X": TILE, "num_warps": warps(TILE)}
    numbers = (gate.numel(), each, float(limit or 0.0))
    triton_launch.launch(_shared_kernel, programs, (gate, up, partial_GC), *numbers, **constants)
    return SharedStats(*over_programs(partial_GC, 1).unbind())


@torch.no_grad()
def sums_of_norms(routed_ND: Tensor, shared_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the norms of the rows of both results, fp32."""
    routed_ND, shared_ND = routed_ND.contiguous(), shared_ND.contiguous()
    (rows, width), sizes = routed_ND.shape, _tile(routed_ND.shape[1])
    programs, each = shares(rows, sizes["BLOCK_P"])
    partial_GC = _partial(routed_ND, programs, 2)
    triton_launch.launch(_norms_kernel, programs, (routed_ND, shared_ND, partial_GC), rows, each, width, **sizes)
    routed, shared = over_programs(partial_GC, 2).unbind()
    return routed, shared
