"""Exact attention over packed documents, a block of queries at a time; neither forward nor backward holds [T, T].

    spans, borders, window ─ plan_blocks ───┐
    rectangles ───────────── plan_rectangles┴► blocks: queries [start, stop) against keys [first_key, stop_key)
    q, k, v ─ heads first ─► for each block and KV head: scores ─ hide ─ softmax ─ · v ─► o, log-sum-exp

A block's keys are, but for rounding, those that its queries may see, so that little work is spent on hidden scores. All query
heads of a KV head are rows of one product. Backward recomputes a block's scores; with the log-sum-exp of a query's scores it
needs no other block to know the probabilities, so that a query's keys may be split over blocks, and blocks over ranks.
Scores and softmax are fp32 for bf16 inputs too; probabilities are rounded to bf16 for the products that follow.

Blocks lie on a fixed grid and key ranges keep to it, whatever the documents are: a matrix product of a shape not met before
costs a millisecond of set-up on CPUs, and documents have every length.

Shapes: N query tokens, M key tokens, H query heads, K KV heads, G = H / K, A head_dim, P = N·G query rows of a KV head; of a
block: Q queries, R = Q·G rows of scores, J keys.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from steptron.nn.matmul import matmul_nt

Span = tuple[int, int, int]
"""(start, stop, key): queries [start, stop) are those of the keys from `key` on, one for one."""
Rectangle = tuple[int, int, int, int]
"""(start, stop, first_key, stop_key): each of the queries sees each of the keys."""


@dataclass(frozen=True, eq=False)
class QueryBlock:
    """Queries [start, stop) against keys [first_key, stop_key), and which scores are hidden (column 0 is `first_key`)."""

    start: int
    stop: int
    first_key: int
    stop_key: int
    right: Tensor | None
    """[Q, 1, Q], added to the scores of the last Q keys, the queries' own: 0 seen, −inf hidden (later keys; other documents of
    the block). None: a rectangle."""
    left: Tensor | None
    """[Q, 1, any], added to the scores of the first keys: those that leave the window inside the block."""
    hidden_keys: int
    """So many of the first columns belong to another document than the first query."""
    border: int | None
    """From this query of the block on, documents start inside the block: no key before the last Q is seen."""
    seeing: int
    """So many of the queries see anything; the others, after them, only fill up the block of a rectangle."""


@lru_cache(maxsize=32)
def plan_blocks(
    spans: tuple[Span, ...],
    borders: tuple[int, ...],
    window: int | None,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[QueryBlock, ...]:
    """Causal attention of each span: a query sees the keys of its document up to its own, the last `window` of them. Documents
    start at the ascending `borders` among the keys; a span must not reach back beyond the first. Blocks of `size` queries (a
    span's last may be smaller). Remembered, because all layers of a kind ask for the same."""
    reach = borders[-1] if window is None else window

    def bias(hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf).to(device, dtype).unsqueeze(1)

    @cache
    def band(rows: int, columns: int, offset: int) -> Tensor:
        distance = torch.arange(rows).unsqueeze(1) + offset - torch.arange(columns)
        return bias((distance < 0) | (distance >= reach))

    blocks = []
    for first, last, key in spans:
        for start in range(first, last, size):
            stop = min(start + size, last)
            rows, own, stop_key = stop - start, start - first + key, stop - first + key
            document = bisect_right(borders, own) - 1
            inside = borders[document + 1 : bisect_right(borders, stop_key - 1)]
            first_seen = max(borders[document], own - reach + 1)
            first_key = max(0, own - -(-(own - first_seen) // size) * size)
            leaving = max(0, stop_key - reach - first_key)
            right = band(rows, rows, 0)
            if inside:
                index = torch.bucketize(torch.arange(own, stop_key), torch.tensor(inside), right=True)
                right = right + bias(index.unsqueeze(1) != index)
            blocks.append(
                QueryBlock(
                    start=start,
                    stop=stop,
                    first_key=first_key,
                    stop_key=stop_key,
                    right=right,
                    left=band(rows, leaving, own - first_key) if leaving else None,
                    hidden_keys=max(0, borders[document] - first_key),
                    border=inside[0] - own if inside else None,
                    seeing=rows,
                )
            )
    return tuple(blocks)


@lru_cache(maxsize=32)
def plan_rectangles(rectangles: tuple[Rectangle, ...], tokens: int, size: int) -> tuple[QueryBlock, ...]:
    """Blocks of the rectangles, of `size` of the `tokens` queries each; rounded up to the grid, and what is too much is hidden."""
    blocks = []
    for first, last, first_key, stop_key in rectangles:
        grid_key = max(0, stop_key - -(-(stop_key - first_key) // size) * size)
        for start in range(first, last, size):
            blocks.append(
                QueryBlock(
                    start=start,
                    stop=min(start + size, tokens),
                    first_key=grid_key,
                    stop_key=stop_key,
                    right=None,
                    left=None,
                    hidden_keys=first_key - grid_key,
                    border=None,
                    seeing=min(size, last - start),
                )
            )
    return tuple(blocks)


def heads_first(x_NHA: Tensor, num_kv_heads: int) -> Tensor:
    """[N, H, A] → contiguous [K, N·G, A]: a block's queries of all heads that share a KV head are neighbouring rows."""
    heads, width = x_NHA.shape[1:]
    x_NKGA = x_NHA.unflatten(1, (num_kv_heads, heads // num_kv_heads))
    return x_NKGA.transpose(0, 1).reshape(num_kv_heads, -1, width).contiguous()


def tokens_first(x_KPA: Tensor, tokens: int) -> Tensor:
    """The inverse of `heads_first`: [K, N·G, A] → contiguous [N, H, A]."""
    return x_KPA.unflatten(1, (tokens, -1)).transpose(0, 1).flatten(1, 2)


def _scores(block: QueryBlock, q_RA: Tensor, k_JA: Tensor) -> Tensor:
    """q · kᵀ of a block and a KV head [R, J], fp32 (fp64 for fp64), −inf where hidden; q carries the scale."""
    scores_RJ = matmul_nt(q_RA, k_JA)
    rows = block.stop - block.start
    scores_QGJ = scores_RJ.view(rows, -1, scores_RJ.shape[-1])
    # add_ on a view, not `view[…] += `, which would also copy the view onto itself.
    if block.right is not None:
        scores_QGJ[..., -rows:].add_(block.right)
    if block.left is not None:
        scores_QGJ[..., : block.left.shape[-1]].add_(block.left)
    if block.hidden_keys:
        scores_QGJ[..., : block.hidden_keys] = -torch.inf
    if block.border is not None:
        scores_QGJ[block.border :, :, :-rows] = -torch.inf
    return scores_RJ


def forward_blocks(
    q_KPA: Tensor,
    k_KMA: Tensor,
    v_KMA: Tensor,
    blocks: tuple[QueryBlock, ...],
    group: int,
    o_KPA: Tensor,
    lse_KP: Tensor | None = None,
) -> None:
    """Attention of all blocks into `o` and the log-sum-exp of each query's scores into `lse`, in place.

    Blocks of spans write; their queries see at least their own key. Rectangles need `lse` and are merged with what is there:
    o = 0 and lse = −inf where nothing was seen before. `lse` is fp32 (fp64 for fp64), as should `o` be for merging."""
    scaled_KPA, wide_k_KMA = _scaled(q_KPA), _wide(k_KMA)
    for block in blocks:
        rows, keys = slice(block.start * group, block.stop * group), slice(block.first_key, block.stop_key)
        seeing = block.seeing * group
        for head in range(len(q_KPA)):
            scores_RJ = _scores(block, scaled_KPA[head, rows], wide_k_KMA[head, keys])
            p_RJ = torch.softmax(scores_RJ, dim=-1)
            o_RA = matmul_nt(p_RJ.to(q_KPA.dtype), v_KMA[head, keys].mT)
            if lse_KP is None:
                o_KPA[head, rows] = o_RA
                continue
            # The largest probability is exp(largest score − lse).
            lse_R = scores_RJ.amax(-1) - p_RJ.amax(-1).log_()
            if block.right is not None:
                o_KPA[head, rows], lse_KP[head, rows] = o_RA, lse_R
            else:
                some = slice(rows.start, rows.start + seeing)
                merge(o_KPA[head, some], lse_KP[head, some], o_RA[:seeing], lse_R[:seeing])


def merge(o_RA: Tensor, lse_R: Tensor, more_o_RA: Tensor, more_lse_R: Tensor) -> None:
    """Attention over two sets of keys from that over each, in place of the first, which may be empty (o = 0, lse = −inf)."""
    both_R = torch.logaddexp(lse_R, more_lse_R)
    o_RA.mul_((lse_R - both_R).exp_().unsqueeze(-1))
    o_RA.add_(more_o_RA * (more_lse_R - both_R).exp_().unsqueeze(-1))
    lse_R.copy_(both_R)


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradients:
    """Sums that `backward_blocks` adds to. The scale of the scores is still missing in those of queries and keys."""

    q_KPA: Tensor
    """Blocks of spans write, rectangles add."""
    k_KAM: Tensor
    """Transposed, so that a block's keys, its longest side, are the width of the two products that end here. Wide, as `v`."""
    v_KAM: Tensor

    @classmethod
    def start(cls, q_KPA: Tensor, k_KMA: Tensor) -> "Gradients":
        """Nothing yet for queries, all of which must be written first; zeros for keys and values."""
        grad_k_KAM = torch.zeros_like(_wide(k_KMA.mT), memory_format=torch.contiguous_format)
        return cls(q_KPA=torch.empty_like(q_KPA), k_KAM=grad_k_KAM, v_KAM=torch.zeros_like(grad_k_KAM))


@dataclass(frozen=True, kw_only=True, eq=False)
class AllKeys:
    """What backward must know of a query's attention over all its keys, where a block holds only some; wide."""

    lse_KP: Tensor
    delta_KP: Tensor
    """Σ grad_o · o."""


def backward_blocks(
    q_KPA: Tensor,
    k_KMA: Tensor,
    v_KMA: Tensor,
    grad_o_KPA: Tensor,
    blocks: tuple[QueryBlock, ...],
    group: int,
    grads: Gradients,
    whole: AllKeys | None = None,
) -> None:
    """Add the gradients of the keys of these blocks to `grads`. `whole` None: each query has all its keys in one block, where
    the softmax done again is faster than what follows from `whole`."""
    narrow = q_KPA.dtype
    scaled_KPA, wide_k_KMA, wide_v_KMA, wide_grad_o_KPA = _scaled(q_KPA), *map(_wide, (k_KMA, v_KMA, grad_o_KPA))
    for block in blocks:
        rows, keys = slice(block.start * group, block.stop * group), slice(block.first_key, block.stop_key)
        for head in range(len(q_KPA)):
            scores_RJ = _scores(block, scaled_KPA[head, rows], wide_k_KMA[head, keys])
            grad_p_RJ = matmul_nt(wide_grad_o_KPA[head, rows], wide_v_KMA[head, keys])
            if whole is None:
                p_RJ = torch.softmax(scores_RJ, dim=-1)
                grad_s_RJ = torch.ops.aten._softmax_backward_data(grad_p_RJ, p_RJ, -1, p_RJ.dtype).to(narrow)
            else:
                p_RJ = scores_RJ.sub_(whole.lse_KP[head, rows].unsqueeze(-1)).exp_()
                p_RJ[block.seeing * group :] = 0.0
                grad_s_RJ = grad_p_RJ.sub_(whole.delta_KP[head, rows].unsqueeze(-1)).mul_(p_RJ).to(narrow)
            grads.v_KAM[head, :, keys].add_(matmul_nt(grad_o_KPA[head, rows].mT, p_RJ.to(narrow).mT))
            grads.k_KAM[head, :, keys].add_(matmul_nt(q_KPA[head, rows].mT, grad_s_RJ.mT))
            grad_q_RA = matmul_nt(grad_s_RJ, k_KMA[head, keys].mT)
            if block.right is not None:
                grads.q_KPA[head, rows] = grad_q_RA
            else:
                grads.q_KPA[head, rows].add_(grad_q_RA)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scaled(q_KPA: Tensor) -> Tensor:
    return _wide(q_KPA) * q_KPA.shape[-1] ** -0.5


class BlockAttention(torch.autograd.Function):
    """q [N, H, A], k, v [M, K, A], blocks of spans → o [N, H, A]; scores are scaled by A^−½."""

    @staticmethod
    def forward(ctx, q_NHA: Tensor, k_MKA: Tensor, v_MKA: Tensor, blocks: tuple[QueryBlock, ...]) -> Tensor:
        ctx.save_for_backward(q_NHA, k_MKA, v_MKA)
        ctx.blocks = blocks
        num_kv_heads, group = k_MKA.shape[1], q_NHA.shape[1] // k_MKA.shape[1]
        q_KPA, k_KMA, v_KMA = (heads_first(x, num_kv_heads) for x in (q_NHA, k_MKA, v_MKA))
        o_KPA = torch.empty_like(q_KPA)
        forward_blocks(q_KPA, k_KMA, v_KMA, blocks, group, o_KPA)
        return tokens_first(o_KPA, len(q_NHA))

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        q_NHA, k_MKA, v_MKA = ctx.saved_tensors
        num_kv_heads, group = k_MKA.shape[1], q_NHA.shape[1] // k_MKA.shape[1]
        tensors = (heads_first(x, num_kv_heads) for x in (q_NHA, k_MKA, v_MKA, grad_outputs[0]))
        q_KPA, k_KMA, v_KMA, grad_o_KPA = tensors
        grads = Gradients.start(q_KPA, k_KMA)
        backward_blocks(q_KPA, k_KMA, v_KMA, grad_o_KPA, ctx.blocks, group, grads)
        scale = q_NHA.shape[-1] ** -0.5
        grad_q_NHA = tokens_first(grads.q_KPA.mul_(scale), len(q_NHA))
        grad_k_MKA = grads.k_KAM.mul_(scale).permute(2, 0, 1).to(k_MKA.dtype).contiguous()
        grad_v_MKA = grads.v_KAM.permute(2, 0, 1).to(v_MKA.dtype).contiguous()
        return grad_q_NHA, grad_k_MKA, grad_v_MKA, None
