"""Grouped-query attention with q/k norms, RoPE and a head-wise gate; full or sliding; documents never see each other.

    x ─┬─ q_proj ─ q_norm ─ RoPE ─┐
       ├─ k_proj ─ k_norm ─ RoPE ─┼─ kernel(q, k, v, packing) ─ · sigmoid(gate) a head ─ o_proj ─►
       ├─ v_proj ─────────────────┘                              │
       └─ gate_proj ─────────────────────────────────────────────┘

Two kernels, both over flattened packed tokens and both exact. On CUDA in half precision they are PyTorch's variable-length flash
attention; elsewhere they are the blocks of blocks.py, which on CPU outrun scaled_dot_product_attention. A module's kernel is an
attribute, so that context parallelism can replace it from outside.

Shapes: B rows, T tokens of a row on this rank, N = B·T, M keys, D hidden, H query heads, K KV heads, A head_dim, R rotated planes.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from steptron.config.schema import AttentionConfig
from steptron.nn.block_attention import BlockAttention, Span, plan_blocks
from steptron.nn.linear import Linear
from steptron.nn.norm import RMSNorm
from steptron.nn.packing import Packing
from steptron.nn.rope import apply_rope

Kernel = Callable[[Tensor, Tensor, Tensor, Packing], Tensor]
"""(q [N, H, A], k [N, K, A], v [N, K, A], packing) → o [N, H, A]."""


def block_size(group: int, longest: int, window: int | None) -> int:
    """Queries a block, a multiple of 16. Sliding: the window, where products are large and no more than half of a block's scores
    are hidden. Full: what keeps the scores of a block and a KV head with `longest` keys below 2M."""
    if window is not None:
        return min(-(-window // 16) * 16, 128)
    rows = 128
    while rows > 16 and rows * group * longest > 2**21:
        rows //= 2
    return rows


def use_flash(q_NHA: Tensor) -> bool:
    """Whether PyTorch's flash attention serves these queries, not the blocks."""
    return q_NHA.is_cuda and q_NHA.dtype in (torch.bfloat16, torch.float16)


def _flash(
    q_NHA: Tensor, k_MKA: Tensor, v_MKA: Tensor, cu: tuple[Tensor, Tensor], longest: tuple[int, int], window: int | None
) -> Tensor:
    before = -1 if window is None else window - 1  # keys besides the query's own; −1: all
    o_NHA = varlen_attn(q_NHA, k_MKA, v_MKA, *cu, *longest, window_size=(before, 0), enable_gqa=True)
    assert isinstance(o_NHA, Tensor), "varlen_attn returns a pair only when asked for the log-sum-exp"
    return o_NHA


def _blocks(
    q_NHA: Tensor,
    k_MKA: Tensor,
    v_MKA: Tensor,
    spans: tuple[Span, ...],
    borders: tuple[int, ...],
    longest: int,
    window: int | None,
) -> Tensor:
    size = block_size(q_NHA.shape[1] // k_MKA.shape[1], longest, window)
    wide = torch.promote_types(q_NHA.dtype, torch.float32)
    blocks = plan_blocks(spans, borders, window, size, wide, q_NHA.device)
    return BlockAttention.apply(q_NHA, k_MKA, v_MKA, blocks)  # pyright: ignore[reportReturnType]


def _attend(q_NHA: Tensor, k_NKA: Tensor, v_NKA: Tensor, packing: Packing, window: int | None) -> Tensor:
    cu_seqlens, longest = packing.cu_seqlens, packing.longest
    assert len(q_NHA) == len(k_NKA) == cu_seqlens[-1], (
        "a rank that holds pieces of rows needs a kernel of parallel/cp.py"
    )
    if use_flash(q_NHA):
        cu_seqlens_S = packing.cu_seqlens_S
        return _flash(q_NHA, k_NKA, v_NKA, (cu_seqlens_S, cu_seqlens_S), (longest, longest), window)
    return _blocks(q_NHA, k_NKA, v_NKA, ((0, len(q_NHA), 0),), cu_seqlens, longest, window)


def full_attention(
    q_NHA: Float[Tensor, "N H A"], k_NKA: Float[Tensor, "N K A"], v_NKA: Float[Tensor, "N K A"], packing: Packing
) -> Float[Tensor, "N H A"]:
    """Causal attention inside each document, scaled by A^−½; query head h reads KV head h // (H / K)."""
    return _attend(q_NHA, k_NKA, v_NKA, packing, None)


def sliding_attention(
    q_NHA: Float[Tensor, "N H A"],
    k_NKA: Float[Tensor, "N K A"],
    v_NKA: Float[Tensor, "N K A"],
    packing: Packing,
    window: int,
) -> Float[Tensor, "N H A"]:
    """The same, where a query sees the last `window` keys, its own included. Cost O(N · window)."""
    return _attend(q_NHA, k_NKA, v_NKA, packing, window)


def span_attention(
    q_NHA: Float[Tensor, "N H A"],
    k_MKA: Float[Tensor, "M K A"],
    v_MKA: Float[Tensor, "M K A"],
    spans: tuple[Span, ...],
    borders: tuple[int, ...],
    window: int | None,
) -> Float[Tensor, "N H A"]:
    """The same for some of the queries only: those of a span (start, stop, key) belong to the keys from `key` on.

    Documents are the keys from one of the `borders` to the next (0 first, M last). Spans are ascending, both in queries, all of
    which they cover, and in keys."""
    longest = max(stop - start for start, stop in pairwise(borders))
    if use_flash(q_NHA):
        cu_queries_S, cu_keys_S, longest_queries = _queries_and_keys(spans, borders, q_NHA.device)
        return _flash(q_NHA, k_MKA, v_MKA, (cu_queries_S, cu_keys_S), (longest_queries, longest), window)
    return _blocks(q_NHA, k_MKA, v_MKA, spans, borders, longest, window)


def queries_before(spans: tuple[Span, ...], borders: tuple[int, ...]) -> tuple[int, ...]:
    """For each border among the keys, how many queries belong to keys before it."""
    return tuple(
        sum(min(max(border - key, 0), stop - start) for start, stop, key in spans if key < border) for border in borders
    )


@lru_cache(maxsize=8)
def _queries_and_keys(
    spans: tuple[Span, ...], borders: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """Where each document's queries and keys start, as a variable-length kernel wants it, and the most queries of one."""
    queries = queries_before(spans, borders)
    cu_queries_S, cu_keys_S = (torch.tensor(cu, dtype=torch.int32, device=device) for cu in (queries, borders))
    return cu_queries_S, cu_keys_S, max(stop - start for start, stop in pairwise(queries))


class Attention(nn.Module):
    """One attention layer of a kind; `config.window` decides which kernel it starts with."""

    def __init__(self, hidden_size: int, head_dim: int, config: AttentionConfig, norm_eps: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.window = config.window
        self.q_proj = Linear(hidden_size, config.num_heads * head_dim)
        self.k_proj = Linear(hidden_size, config.num_kv_heads * head_dim)
        self.v_proj = Linear(hidden_size, config.num_kv_heads * head_dim)
        self.o_proj = Linear(config.num_heads * head_dim, hidden_size)
        self.gate_proj = Linear(hidden_size, config.num_heads)
        self.q_norm = RMSNorm(head_dim, norm_eps)
        self.k_norm = RMSNorm(head_dim, norm_eps)
        self.kernel: Kernel = full_attention
        if config.window is not None:
            self.kernel = partial(sliding_attention, window=config.window)

    def forward(self, x_BTD: Tensor, packing: Packing, rope: tuple[Tensor, Tensor]) -> Tensor:
        """[B, T, D] → [B, T, D]. `rope` is cos and sin [N, R] of the packing's positions."""
        x_ND = x_BTD.flatten(0, 1)
        # The number of heads is what the projections give: under tensor parallelism it is a rank's share.
        q_NHA = self.q_proj(x_ND).unflatten(-1, (-1, self.head_dim))
        k_NKA = self.k_proj(x_ND).unflatten(-1, (-1, self.head_dim))
        v_NKA = self.v_proj(x_ND).unflatten(-1, (-1, self.head_dim))
        q_NHA = apply_rope(self.q_norm(q_NHA), *rope)
        k_NKA = apply_rope(self.k_norm(k_NKA), *rope)
        o_NHA = self.kernel(q_NHA, k_NKA, v_NKA, packing)
        gated_NHA = o_NHA * self.gate_proj(x_ND).sigmoid().unsqueeze(-1)
        return self.o_proj(gated_NHA.flatten(1)).view(x_BTD.shape)
