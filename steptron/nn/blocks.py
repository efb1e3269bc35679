"""Exact attention over packed documents, a block of queries at a time; neither forward nor backward holds [T, T].

    cu_seqlens, window ─ plan_blocks ─► blocks: queries [start, stop) against keys [first_key, stop)
    q, k, v ─ heads first ─► for each block and KV head: scores ─ hide ─ softmax ─ · v ─► o

A block's keys are, but for rounding, those that its queries may see, so that little work is spent on hidden scores. All query
heads of a KV head are rows of one product. Backward recomputes a block's scores: from forward to backward live q, k and v.
Scores and softmax are fp32 for bf16 inputs too; probabilities are rounded to bf16 for the products that follow.

Blocks lie on a fixed grid and key ranges start on it, whatever the documents are: a matrix product of a shape not met before
costs a millisecond of set-up on CPUs, and documents have every length.

Shapes: N tokens, H query heads, K KV heads, G = H / K, A head_dim; of a block: Q queries, R = Q·G rows of scores, J keys.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from steptron.nn.matmul import matmul_nt


@dataclass(frozen=True, eq=False)
class Block:
    """Queries [start, stop) against keys [first_key, stop), and which scores are hidden (column 0 is `first_key`)."""

    start: int
    stop: int
    first_key: int
    right: Tensor
    """[Q, 1, Q], added to the scores of the last Q keys: 0 seen, −inf hidden (later keys; other documents of the block)."""
    left: Tensor | None
    """[Q, 1, any], added to the scores of the first keys: those that leave the window inside the block."""
    hidden_keys: int
    """So many of the first columns belong to another document than the first query."""
    border: int | None
    """From this query of the block on, documents start inside the block: no key before `start` is seen."""


@lru_cache(maxsize=8)
def plan_blocks(
    cu_seqlens: tuple[int, ...], window: int | None, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Block, ...]:
    """Blocks of `size` queries (the last may be smaller). Remembered, because all layers of a kind ask for the same."""
    tokens = cu_seqlens[-1]
    reach = tokens if window is None else window

    def bias(hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf).to(device, dtype).unsqueeze(1)

    @cache
    def band(rows: int, columns: int, offset: int) -> Tensor:
        distance = torch.arange(rows).unsqueeze(1) + offset - torch.arange(columns)
        return bias((distance < 0) | (distance >= reach))

    blocks = []
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        rows = stop - start
        document = bisect_right(cu_seqlens, start) - 1
        inside = cu_seqlens[document + 1 : bisect_right(cu_seqlens, stop - 1)]
        first_seen = max(cu_seqlens[document], start - reach + 1)
        first_key = first_seen // size * size
        leaving = max(0, stop - reach - first_key)
        right = band(rows, rows, 0)
        if inside:
            index = torch.bucketize(torch.arange(start, stop), torch.tensor(inside), right=True)
            right = right + bias(index.unsqueeze(1) != index)
        blocks.append(
            Block(
                start=start,
                stop=stop,
                first_key=first_key,
                right=right,
                left=band(rows, leaving, start - first_key) if leaving else None,
                hidden_keys=max(0, cu_seqlens[document] - first_key),
                border=inside[0] - start if inside else None,
            )
        )
    return tuple(blocks)


def _probabilities(block: Block, q_RA: Tensor, k_JA: Tensor) -> Tensor:
    """softmax(q · kᵀ) of a block and a KV head [R, J], fp32 (fp64 for fp64); q carries the scale."""
    scores_RJ = matmul_nt(q_RA, k_JA)
    rows = block.stop - block.start
    scores_QGJ = scores_RJ.view(rows, -1, scores_RJ.shape[-1])
    # add_ on a view, not `view[…] += `, which would also copy the view onto itself.
    scores_QGJ[..., -rows:].add_(block.right)
    if block.left is not None:
        scores_QGJ[..., : block.left.shape[-1]].add_(block.left)
    if block.hidden_keys:
        scores_QGJ[..., : block.hidden_keys] = -torch.inf
    if block.border is not None:
        scores_QGJ[block.border :, :, : block.start - block.first_key] = -torch.inf
    return torch.softmax(scores_RJ, dim=-1)


def _heads_first(x_NHA: Tensor, num_kv_heads: int) -> Tensor:
    """[N, H, A] → contiguous [K, N·G, A]: a block's queries of all heads that share a KV head are neighbouring rows."""
    heads, width = x_NHA.shape[1:]
    x_NKGA = x_NHA.unflatten(1, (num_kv_heads, heads // num_kv_heads))
    return x_NKGA.transpose(0, 1).reshape(num_kv_heads, -1, width).contiguous()


def _tokens_first(x_KRA: Tensor, tokens: int) -> Tensor:
    """The inverse of `_heads_first`: [K, N·G, A] → contiguous [N, H, A]."""
    return x_KRA.unflatten(1, (tokens, -1)).transpose(0, 1).flatten(1, 2)


class BlockAttention(torch.autograd.Function):
    """q [N, H, A], k, v [N, K, A], blocks → o [N, H, A]; scores are scaled by A^−½."""

    @staticmethod
    def forward(ctx, q_NHA: Tensor, k_NKA: Tensor, v_NKA: Tensor, blocks: tuple[Block, ...]) -> Tensor:
        ctx.save_for_backward(q_NHA, k_NKA, v_NKA)
        ctx.blocks = blocks
        narrow, wide = q_NHA.dtype, torch.promote_types(q_NHA.dtype, torch.float32)
        (tokens, num_kv_heads, width), group = k_NKA.shape, q_NHA.shape[1] // k_NKA.shape[1]
        q_KRA, k_KNA, v_KNA = (_heads_first(x, num_kv_heads) for x in (q_NHA, k_NKA, v_NKA))
        scaled_KRA, wide_k_KNA = q_KRA.to(wide) * width**-0.5, k_KNA.to(wide)
        o_KRA = torch.empty_like(q_KRA)
        for block in blocks:
            rows = slice(block.start * group, block.stop * group)
            keys = slice(block.first_key, block.stop)
            for head in range(num_kv_heads):
                p_RJ = _probabilities(block, scaled_KRA[head, rows], wide_k_KNA[head, keys]).to(narrow)
                o_KRA[head, rows] = matmul_nt(p_RJ, v_KNA[head, keys].mT)
        return _tokens_first(o_KRA, tokens)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        q_NHA, k_NKA, v_NKA = ctx.saved_tensors
        narrow, wide = q_NHA.dtype, torch.promote_types(q_NHA.dtype, torch.float32)
        (tokens, num_kv_heads, width), group = k_NKA.shape, q_NHA.shape[1] // k_NKA.shape[1]
        scale = width**-0.5
        q_KRA, k_KNA, v_KNA, grad_o_KRA = (_heads_first(x, num_kv_heads) for x in (q_NHA, k_NKA, v_NKA, grads[0]))
        scaled_KRA = q_KRA.to(wide) * scale
        wide_k_KNA, wide_v_KNA, wide_grad_o_KRA = k_KNA.to(wide), v_KNA.to(wide), grad_o_KRA.to(wide)
        grad_q_KRA = torch.empty_like(q_KRA)
        # Transposed, so that a block's keys, its longest side, are the width of the two products that end here.
        grad_k_KAN = torch.zeros_like(wide_k_KNA.mT, memory_format=torch.contiguous_format)
        grad_v_KAN = torch.zeros_like(grad_k_KAN)
        for block in ctx.blocks:
            rows = slice(block.start * group, block.stop * group)
            keys = slice(block.first_key, block.stop)
            for head in range(num_kv_heads):
                p_RJ = _probabilities(block, scaled_KRA[head, rows], wide_k_KNA[head, keys])
                grad_p_RJ = matmul_nt(wide_grad_o_KRA[head, rows], wide_v_KNA[head, keys])
                grad_s_RJ = torch.ops.aten._softmax_backward_data(grad_p_RJ, p_RJ, -1, wide).to(narrow)
                grad_v_KAN[head, :, keys].add_(matmul_nt(grad_o_KRA[head, rows].mT, p_RJ.to(narrow).mT))
                grad_k_KAN[head, :, keys].add_(matmul_nt(q_KRA[head, rows].mT, grad_s_RJ.mT))
                grad_q_KRA[head, rows] = matmul_nt(grad_s_RJ, k_KNA[head, keys].mT).mul_(scale)
        grad_k_NKA = grad_k_KAN.mul_(scale).permute(2, 0, 1).to(narrow).contiguous()
        grad_v_NKA = grad_v_KAN.permute(2, 0, 1).to(narrow).contiguous()
        return _tokens_first(grad_q_KRA, tokens), grad_k_NKA, grad_v_NKA, None
