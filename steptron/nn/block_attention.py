"""Exact attention over packed documents, one block of queries at a time; no pass stores [T, T] scores.

    spans, borders, window ─ plan_blocks ───┐
    rectangles ───────────── plan_rectangles┴► blocks: queries [start, stop) against keys [first_key, stop_key)
    q, k, v ─ heads first ─► for each block and KV head: scores ─ hide ─ softmax ─ · v ─► o, log-sum-exp

The keys of a block are, up to rounding to a grid, those that its queries may see, so little work is spent on hidden
scores. All query heads of a KV head are rows of one product. Backward recomputes the scores of a block. The log-sum-exp
of a query's scores is enough to recover its probabilities, so the keys of a query may be split over blocks, and blocks
over ranks. Scores and softmax are fp32 for bf16 inputs too; probabilities are rounded to bf16 for the products that
follow.

Blocks lie on a fixed grid, and so do their key ranges, whatever the documents are: on a CPU the first matrix product of
a new shape costs a millisecond of set-up, and documents have every length.

Shapes: N query tokens, M key tokens, H query heads, K KV heads, G = H / K, A head_dim, P = N·G query rows of a KV head;
of a block: Q queries, R = Q·G rows of scores, J keys.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from steptron.nn.matmul import matmul_nt
from steptron.torch_internals import softmax_backward

Span = tuple[int, int, int]
"""(start, stop, key): the queries [start, stop) belong to the same tokens as the keys from `key` on, one to one."""
Rectangle = tuple[int, int, int, int]
"""(start, stop, first_key, stop_key): every query of the range sees every key of the range."""


@dataclass(frozen=True, eq=False)
class QueryBlock:
    """Queries [start, stop) against keys [first_key, stop_key), and the scores that are hidden.

    Column 0 of the scores is `first_key`.
    """

    start: int
    stop: int
    first_key: int
    stop_key: int
    right: Tensor | None
    """[Q, 1, Q], added to the scores of the last Q keys, which are those of the queries' own tokens.

    0 where seen; −inf where hidden (later keys, or keys of another document of the block). None: a block of a
    rectangle.
    """
    left: Tensor | None
    """[Q, 1, any], added to the scores of the first keys, which leave the window of some query of the block."""
    hidden_keys: int
    """Number of first columns that belong to an earlier document than the first query."""
    border: int | None
    """Index of the first query in the block that starts a new document.

    From it on, no query sees keys before the last Q. None: the block lies within one document.
    """
    seeing: int
    """Number of queries that see anything; the queries after them only fill up the block of a rectangle."""


@lru_cache(maxsize=32)
def plan_blocks(
    spans: tuple[Span, ...],
    borders: tuple[int, ...],
    window: int | None,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[QueryBlock, ...]:
    """Return the blocks of causal attention over spans, `size` queries each (the last of a span may be smaller).

    A query sees the keys of its document up to its own, and of these the last `window`. Documents start at the
    ascending `borders` among the keys; no query of a span may see keys before the first border. The result is cached,
    because all layers of the same kind ask for the same one.
    """
    reach = borders[-1] if window is None else window
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
            right = _band(rows, rows, 0, window, dtype, device)
            if inside:
                index = torch.bucketize(torch.arange(own, stop_key), torch.tensor(inside), right=True)
                right = right + _bias(index.unsqueeze(1) != index, dtype, device)
            blocks.append(
                QueryBlock(
                    start=start,
                    stop=stop,
                    first_key=first_key,
                    stop_key=stop_key,
                    right=right,
                    left=_band(rows, leaving, own - first_key, window, dtype, device) if leaving else None,
                    hidden_keys=max(0, borders[document] - first_key),
                    border=inside[0] - own if inside else None,
                    seeing=rows,
                )
            )
    return tuple(blocks)


@lru_cache(maxsize=32)
def plan_rectangles(rectangles: tuple[Rectangle, ...], tokens: int, size: int) -> tuple[QueryBlock, ...]:
    """Return the blocks of rectangles, `size` of the `tokens` queries each.

    Blocks are rounded up to the grid; the keys and queries added by rounding are hidden.
    """
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
    """Transpose [N, H, A] to a contiguous [K, N·G, A].

    The queries of a block, of all heads that share a KV head, become neighbouring rows.
    """
    heads, width = x_NHA.shape[1:]
    x_NKGA = x_NHA.unflatten(1, (num_kv_heads, heads // num_kv_heads))
    return x_NKGA.transpose(0, 1).reshape(num_kv_heads, -1, width).contiguous()


def tokens_first(x_KPA: Tensor, tokens: int) -> Tensor:
    """Invert `heads_first`: [K, N·G, A] → contiguous [N, H, A]."""
    return x_KPA.unflatten(1, (tokens, -1)).transpose(0, 1).flatten(1, 2)


def _bias(hidden: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what is added to scores: −inf where `hidden` [Q, J], else 0, as [Q, 1, J]."""
    return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf).to(device, dtype).unsqueeze(1)


@lru_cache(maxsize=32)
def _band(rows: int, columns: int, offset: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the bias [Q, 1, J] of queries that see the last `window` keys up to their own (None: all).

    The key of column 0 lies `offset` before the query of row 0.
    """
    distance = torch.arange(rows).unsqueeze(1) + offset - torch.arange(columns)
    hidden = distance < 0
    return _bias(hidden if window is None else hidden | (distance >= window), dtype, device)


def _scores(block: QueryBlock, q_RA: Tensor, k_JA: Tensor) -> Tensor:
    """Return q · kᵀ of a block and a KV head [R, J], fp32 (fp64 for fp64), −inf where hidden; `q_RA` is scaled."""
    scores_RJ = matmul_nt(q_RA, k_JA)
    rows = block.stop - block.start
    scores_QGJ = scores_RJ.view(rows, -1, scores_RJ.shape[-1])
    # `add_` on a view, because `view[…] += ` would also copy the view onto itself.
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
    """Write the attention of all blocks to `o`, and the log-sum-exp of each query's scores to `lse`, in place.

    Blocks of spans overwrite; each of their queries sees at least its own key. Blocks of rectangles need `lse` and are
    merged with the present values: o = 0 and lse = −inf where nothing was seen before. `lse` is fp32 (fp64 for fp64);
    `o` should be too if it is merged.
    """
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
            # The largest probability is exp(largest score − lse), which gives lse without another pass over the scores.
            lse_R = scores_RJ.amax(-1) - p_RJ.amax(-1).log_()
            if block.right is not None:
                o_KPA[head, rows], lse_KP[head, rows] = o_RA, lse_R
            else:
                some = slice(rows.start, rows.start + seeing)
                merge(o_KPA[head, some], lse_KP[head, some], o_RA[:seeing], lse_R[:seeing])


def merge(o_RA: Tensor, lse_R: Tensor, more_o_RA: Tensor, more_lse_R: Tensor) -> None:
    """Merge attention over two disjoint sets of keys, in place of the first, which may be empty (o = 0, lse = −inf).

    o = Σ_i o_i · exp(lse_i − lse), where lse = ln Σ_i exp(lse_i).
    """
    both_R = torch.logaddexp(lse_R, more_lse_R)
    o_RA.mul_((lse_R - both_R).exp_().unsqueeze(-1))
    o_RA.add_(more_o_RA * (more_lse_R - both_R).exp_().unsqueeze(-1))
    lse_R.copy_(both_R)


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradients:
    """The gradients that `backward_blocks` accumulates. Those of q and k still lack the scale of the scores."""

    q_KPA: Tensor
    """Gradient of the queries; blocks of spans overwrite it, blocks of rectangles add to it."""
    k_KAM: Tensor
    """Gradient of the keys, at least fp32, as is that of the values.

    It is transposed so that the keys of a block, its longest side, are the width of the two products that are added
    here.
    """
    v_KAM: Tensor

    @classmethod
    def start(cls, q_KPA: Tensor, k_KMA: Tensor) -> "Gradients":
        """Return zeros for keys and values, and uninitialised memory for queries, which must be written first."""
        grad_k_KAM = torch.zeros_like(_wide(k_KMA.mT), memory_format=torch.contiguous_format)
        return cls(q_KPA=torch.empty_like(q_KPA), k_KAM=grad_k_KAM, v_KAM=torch.zeros_like(grad_k_KAM))


@dataclass(frozen=True, kw_only=True, eq=False)
class AllKeys:
    """The results over all keys of each query; backward needs them if a block holds only some. At least fp32."""

    lse_KP: Tensor
    delta_KP: Tensor
    """Σ_A grad_o · o of each query row."""


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
    """Add the gradients of these blocks to `grads`.

    If `whole` is None, each query has all its keys in one block. Repeating the softmax is then faster than using
    `whole`.
    """
    narrow = q_KPA.dtype
    scaled_KPA, wide_k_KMA, wide_v_KMA, wide_grad_o_KPA = _scaled(q_KPA), *map(_wide, (k_KMA, v_KMA, grad_o_KPA))
    for block in blocks:
        rows, keys = slice(block.start * group, block.stop * group), slice(block.first_key, block.stop_key)
        for head in range(len(q_KPA)):
            scores_RJ = _scores(block, scaled_KPA[head, rows], wide_k_KMA[head, keys])
            grad_p_RJ = matmul_nt(wide_grad_o_KPA[head, rows], wide_v_KMA[head, keys])
            if whole is None:
                p_RJ = torch.softmax(scores_RJ, dim=-1)
                grad_s_RJ = softmax_backward(grad_p_RJ, p_RJ).to(narrow)
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
    """Attention of q [N, H, A] over k, v [M, K, A] in blocks of spans: o [N, H, A]. Scores are scaled by A^−½."""

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
