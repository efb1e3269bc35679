"""Context parallel: each rank computes on pieces of every row, and attention fetches keys from the other ranks.

    a row of W tokens, R = 2 ranks:   | 0 | 1 | 2 | 3 |     rank 0 holds chunks 0 and 3, rank 1 holds 1 and 2

    full layers      ring        K and V travel around the ranks, see ring.py
                     all_gather  each rank gathers K and V of complete rows
    sliding layers   halo        each rank fetches the window − 1 keys before each of its chunks

One chunk from the head and one from the tail give every rank the same number of keys, so causal attention is balanced.
Every rank knows the document borders of complete rows. So all tables are made on the host without communication, once
per batch or once per layout.

For all_gather and halo, the fetched keys form a buffer of regions, one per row and chunk: the chunk and the keys before
it. Local attention over spans of that buffer does the rest. Gradients of keys return along the same path; they are
summed in at least fp32.

Shapes: B rows, W tokens of a complete row, R ranks, T = W / R tokens of a row on a rank, N = B·T, H query heads, K KV
heads, A head_dim, M keys of the buffer, F keys fetched, S keys sent. K and V are packed as kv [·, 2, K, A].
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from steptron.nn.attention import Attention, span_attention
from steptron.nn.block_attention import Rectangle, Span
from steptron.nn.packing import Packing
from steptron.nn.to_device import to_device
from steptron.parallel.ring import RingAttention, RingPlan
from steptron.torch_internals import all_gather_single, reduce_scatter_single

Method = Literal["ring", "all_gather"]


def apply_cp(attentions: Iterable[Attention], group: ProcessGroup, method: Method) -> None:
    """Give each attention layer a kernel that attends across the ranks of `group`; `method` is that of full layers."""
    for attention in attentions:
        if attention.window is not None:
            attention.kernel = partial(halo_attention, window=attention.window, group=group)
        elif method == "ring":
            attention.kernel = partial(ring_attention, group=group)
        else:
            attention.kernel = partial(gathered_attention, group=group)


def sequence_pieces(seq_len: int, ranks: int, rank: int) -> tuple[tuple[int, int], ...]:
    """Return the pieces of a row that `rank` of `ranks` holds: two of 2·ranks equal chunks.

    They are ranges [start, stop) in the order in which they are stored. A single rank holds the row as one piece.
    """
    if ranks == 1:
        return ((0, seq_len),)
    chunk, rest = divmod(seq_len, 2 * ranks)
    assert rest == 0, f"a row of {seq_len} tokens cannot be split into {2 * ranks} equal chunks"
    return tuple((i * chunk, (i + 1) * chunk) for i in (rank, 2 * ranks - 1 - rank))


def halo_length(window: int) -> int:
    """Return the number of keys before a chunk that the chunk's first query sees."""
    return window - 1


@dataclass(frozen=True)
class SplitRows:
    """Rows that are split over the ranks of a group, from the point of view of one rank."""

    rows: int
    row_length: int
    ranks: int
    rank: int

    @classmethod
    def of(cls, packing: Packing, group: ProcessGroup) -> "SplitRows":
        """Return this rank's view of the packing's rows."""
        place = cls(packing.rows, packing.row_length, dist.get_world_size(group), dist.get_rank(group))
        assert packing.pieces == place.pieces(place.rank), "the packing's pieces are not those of this rank"
        return place

    def pieces(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Return the ranges of a row that `rank` holds."""
        return sequence_pieces(self.row_length, self.ranks, rank)

    @property
    def columns(self) -> int:
        """Number of tokens of a row on one rank, T."""
        return self.row_length // self.ranks

    def holders(self) -> tuple[Tensor, Tensor]:
        """Return, for each token of a row [W], the rank that holds it and its column on that rank."""
        owner_W, column_W = torch.empty(2, self.row_length, dtype=torch.long)
        for rank in range(self.ranks):
            column = 0
            for start, stop in self.pieces(rank):
                owner_W[start:stop] = rank
                column_W[start:stop] = torch.arange(column, column + stop - start)
                column += stop - start
        return owner_W, column_W


def ring_attention(q_NHA: Tensor, k_NKA: Tensor, v_NKA: Tensor, packing: Packing, group: ProcessGroup) -> Tensor:
    """Compute `full_attention` over rows split over `group`, while K and V travel once around the ring."""
    plan = plan_ring(packing.cu_seqlens, SplitRows.of(packing, group))
    return RingAttention.apply(q_NHA, k_NKA, v_NKA, plan, group)  # pyright: ignore[reportReturnType]


def gathered_attention(q_NHA: Tensor, k_NKA: Tensor, v_NKA: Tensor, packing: Packing, group: ProcessGroup) -> Tensor:
    """Compute `full_attention` over rows split over `group`, with K and V gathered from all ranks."""
    plan = plan_gathered(packing.cu_seqlens, SplitRows.of(packing, group), q_NHA.device)
    k_MKA, v_MKA = _AllKeys.apply(k_NKA, v_NKA, plan.index_M, group)  # pyright: ignore[reportGeneralTypeIssues]
    return span_attention(q_NHA, k_MKA, v_MKA, plan.spans, plan.borders, None)


def halo_attention(
    q_NHA: Tensor, k_NKA: Tensor, v_NKA: Tensor, packing: Packing, window: int, group: ProcessGroup
) -> Tensor:
    """Compute `sliding_attention` over rows split over `group`; fetch only the keys before each chunk."""
    place, length = SplitRows.of(packing, group), halo_length(window)
    halo = plan_halo(place, length, q_NHA.device)
    spans, borders = plan_halo_documents(packing.cu_seqlens, place, length)
    k_MKA, v_MKA = _HaloKeys.apply(k_NKA, v_NKA, halo, group)  # pyright: ignore[reportGeneralTypeIssues]
    return span_attention(q_NHA, k_MKA, v_MKA, spans, borders, window)


@lru_cache(maxsize=8)
def plan_ring(cu_seqlens: tuple[int, ...], place: SplitRows) -> RingPlan:
    """Return the document borders among this rank's tokens, and the rectangles of each step.

    In step s, the keys are those of the rank s places before this one.
    """
    borders: set[int] = {place.rows * place.columns}
    steps: list[list[Rectangle]] = [[] for _ in range(place.ranks)]
    for row in range(place.rows):
        origin = row * place.row_length
        query = row * place.columns
        for start, stop in place.pieces(place.rank):
            inside = cu_seqlens[bisect_right(cu_seqlens, origin + start) : bisect_left(cu_seqlens, origin + stop)]
            borders |= {query, *(border - origin - start + query for border in inside)}
            document = bisect_right(cu_seqlens, origin + start) - 1
            begins, ends = (cu_seqlens[document + i] - origin for i in (0, 1))
            for step, rectangles in enumerate(steps):
                key = row * place.columns
                for first, last in place.pieces((place.rank - step) % place.ranks):
                    if begins < last <= start:
                        queries = (query, query + min(stop, ends) - start)
                        rectangles.append((*queries, key + max(first, begins) - first, key + last - first))
                    key += last - first
            query += stop - start
    return RingPlan(borders=tuple(sorted(borders)), rectangles=tuple(map(tuple, steps)))


def plan_regions(
    cu_seqlens: tuple[int, ...], place: SplitRows, firsts: Iterable[int]
) -> tuple[tuple[Span, ...], tuple[int, ...]]:
    """Return the spans and document borders of a buffer of regions.

    There is one region per row and chunk, in this order; it starts at the token of the row that `firsts` gives.
    """
    spans, borders, query, offset = [], [], 0, 0
    chunks = [(row * place.row_length, *piece) for row in range(place.rows) for piece in place.pieces(place.rank)]
    for (origin, start, stop), first in zip(chunks, firsts, strict=True):
        inside = cu_seqlens[bisect_right(cu_seqlens, origin + first) : bisect_left(cu_seqlens, origin + stop)]
        borders += [offset, *(border - origin - first + offset for border in inside)]
        spans.append((query, query + stop - start, offset + start - first))
        query, offset = query + stop - start, offset + stop - first
    return tuple(spans), (*borders, offset)


@dataclass(frozen=True, kw_only=True, eq=False)
class GatheredPlan:
    """The buffer of `gathered_attention`: each region starts with the document of its chunk's first token."""

    spans: tuple[Span, ...]
    borders: tuple[int, ...]
    index_M: Tensor
    """Index of each key of the buffer among the R·N gathered keys."""


@lru_cache(maxsize=8)
def plan_gathered(cu_seqlens: tuple[int, ...], place: SplitRows, device: torch.device) -> GatheredPlan:
    """Return the layout of the buffer that `gathered_attention` selects from all keys."""
    owner_W, column_W = place.holders()
    firsts, index = [], []
    for row in range(place.rows):
        key_W = (owner_W * place.rows + row) * place.columns + column_W
        for start, stop in place.pieces(place.rank):
            origin = row * place.row_length
            first = cu_seqlens[bisect_right(cu_seqlens, origin + start) - 1] - origin
            firsts.append(first)
            index.append(key_W[first:stop])
    spans, borders = plan_regions(cu_seqlens, place, firsts)
    return GatheredPlan(spans=spans, borders=borders, index_M=to_device(torch.cat(index), device))


@dataclass(frozen=True, kw_only=True, eq=False)
class HaloPlan:
    """The exchange of keys before sliding attention; it does not depend on documents."""

    send_S: Tensor
    """Indices of own keys that other ranks need, ordered by receiver."""
    send_sizes: list[int]
    fetch_sizes: list[int]
    """Number of keys fetched from each rank; 0 for this rank, which has its keys already."""
    index_M: Tensor
    """Index of each key of the buffer: the N own keys come first, then the F fetched ones."""


@lru_cache(maxsize=8)
def plan_halo(place: SplitRows, length: int, device: torch.device) -> HaloPlan:
    """Return the exchange before sliding attention: `length` keys before each chunk, fewer at the start of a row."""
    owner_W, column_W = place.holders()
    row_B1 = torch.arange(place.rows).unsqueeze(1) * place.columns

    def needed(receiver: int, sender: int) -> Tensor:
        wanted_W = torch.zeros(place.row_length, dtype=torch.bool)
        for start, _ in place.pieces(receiver):
            wanted_W[max(0, start - length) : start] = True
        return (wanted_W & (owner_W == sender)).nonzero().flatten()

    others = [rank for rank in range(place.ranks) if rank != place.rank]
    key_BW = row_B1 + column_W
    send = {rank: (row_B1 + column_W[needed(rank, place.rank)]).flatten() for rank in others}
    fetched = place.rows * place.columns
    fetch_sizes = [0] * place.ranks
    for rank in others:
        tokens = needed(place.rank, rank)
        fetch_sizes[rank] = place.rows * len(tokens)
        key_BW[:, tokens] = fetched + torch.arange(fetch_sizes[rank]).view(place.rows, -1)
        fetched += fetch_sizes[rank]
    pieces = place.pieces(place.rank)
    index = [key_W[max(0, start - length) : stop] for key_W in key_BW for start, stop in pieces]
    return HaloPlan(
        send_S=to_device(torch.cat([torch.zeros(0, dtype=torch.long), *send.values()]), device),
        send_sizes=[len(send[rank]) if rank in send else 0 for rank in range(place.ranks)],
        fetch_sizes=fetch_sizes,
        index_M=to_device(torch.cat(index), device),
    )


@lru_cache(maxsize=8)
def plan_halo_documents(
    cu_seqlens: tuple[int, ...], place: SplitRows, length: int
) -> tuple[tuple[Span, ...], tuple[int, ...]]:
    """Return the spans and borders of the buffer that `plan_halo` fills."""
    firsts = [max(0, start - length) for start, _ in place.pieces(place.rank)]
    return plan_regions(cu_seqlens, place, firsts * place.rows)


class _AllKeys(torch.autograd.Function):
    """Gather k, v [N, K, A] of all ranks and select keys by `index_M`: [M, K, A]."""

    @staticmethod
    def forward(ctx, k_NKA: Tensor, v_NKA: Tensor, index_M: Tensor, group: ProcessGroup):
        ctx.index_M, ctx.group, ctx.tokens = index_M, group, len(k_NKA)
        kv = torch.stack([k_NKA, v_NKA], dim=1)
        every = kv.new_empty(dist.get_world_size(group) * len(kv), *kv.shape[1:])
        all_gather_single(every, kv, group=group)
        return every.index_select(0, index_M).unbind(1)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        ranks = dist.get_world_size(ctx.group)
        every = _sum_by_key(grads, ctx.index_M, ranks * ctx.tokens)
        grad_kv = every.new_empty(len(every) // ranks, *every.shape[1:])
        reduce_scatter_single(grad_kv, every, group=ctx.group)
        return *grad_kv.to(grads[0].dtype).unbind(1), None, None


class _HaloKeys(torch.autograd.Function):
    """Fetch k, v of other ranks and select own and fetched keys by the plan's index: [N, K, A] to [M, K, A]."""

    @staticmethod
    def forward(ctx, k_NKA: Tensor, v_NKA: Tensor, plan: HaloPlan, group: ProcessGroup):
        ctx.plan, ctx.group, ctx.tokens = plan, group, len(k_NKA)
        kv = k_NKA.new_empty(len(k_NKA) + sum(plan.fetch_sizes), 2, *k_NKA.shape[1:])
        own, fetched = kv[: len(k_NKA)], kv[len(k_NKA) :]
        torch.stack([k_NKA, v_NKA], dim=1, out=own)
        sent = own.index_select(0, plan.send_S)
        dist.all_to_all_single(fetched, sent, plan.fetch_sizes, plan.send_sizes, group=group)
        return kv.index_select(0, plan.index_M).unbind(1)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        plan, narrow = ctx.plan, grads[0].dtype
        total = _sum_by_key(grads, plan.index_M, ctx.tokens + sum(plan.fetch_sizes))
        own, fetched = total[: ctx.tokens], total[ctx.tokens :].to(narrow)
        returned = fetched.new_empty(sum(plan.send_sizes), *fetched.shape[1:])
        dist.all_to_all_single(returned, fetched, plan.send_sizes, plan.fetch_sizes, group=ctx.group)
        # Add one rank's gradients at a time: no key occurs twice in one rank's list, so the order of sums is fixed on
        # GPUs too.
        for index, grad in zip(plan.send_S.split(plan.send_sizes), returned.split(plan.send_sizes), strict=True):
            own.index_add_(0, index, grad.to(own.dtype))
        return *own.to(narrow).unbind(1), None, None


def _sum_by_key(grads: tuple[Tensor, ...], index_M: Tensor, keys: int) -> Tensor:
    """Sum the gradients of the buffer's k and v [M, K, A] over the copies of each key: [keys, 2, K, A], at least fp32.

    A key lies in at most two regions, so its sum has only one order.
    """
    grad_kv = torch.stack(grads, dim=1)
    total = grad_kv.new_zeros(keys, *grad_kv.shape[1:], dtype=torch.promote_types(grad_kv.dtype, torch.float32))
    return total.index_add_(0, index_M, grad_kv.to(total.dtype))
