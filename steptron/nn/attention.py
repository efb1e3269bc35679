"""Grouped-query attention with q/k norms, RoPE and a gate per head; full or sliding-window, within documents.

    x ─┬─ q_proj ─ q_norm ─ RoPE ─┐
       ├─ k_proj ─ k_norm ─ RoPE ─┼─ kernel(q, k, v, packing) ─ · sigmoid(gate) per head ─ o_proj ─►
       ├─ v_proj ─────────────────┘                              │
       └─ gate_proj ─────────────────────────────────────────────┘

There are two kernels, both exact and over flattened packed tokens. On CUDA in half precision, PyTorch's variable-length
flash attention is used. Elsewhere it is the blocks of block_attention.py, which are faster on a CPU than
scaled_dot_product_attention. The kernel is an attribute of the module, so that context parallelism can replace it from
outside. So are the norm with RoPE and the gate, which are one kernel each on GPUs (elementwise_triton.py).

Shapes: B rows, T tokens of a row on this rank, N = B·T, M keys, D hidden, H query heads, K KV heads, A head_dim, R
rotated planes.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import attention as implementations

from steptron.config.kernels import AttentionBackend
from steptron.config.schema import AttentionConfig, Precision
from steptron.errors import RecipeError
from steptron.nn.block_attention import BlockAttention, Span, plan_blocks
from steptron.nn.linear import Linear
from steptron.nn.norm import RMSNorm, rms_norm
from steptron.nn.packing import Packing
from steptron.nn.rope import apply_rope
from steptron.nn.to_local import local
from steptron.torch_internals import flash_attention

Kernel = Callable[[Tensor, Tensor, Tensor, Packing], Tensor]
"""Maps (q [N, H, A], k [N, K, A], v [N, K, A], packing) to o [N, H, A]."""
Turn = Callable[[Tensor, Tensor, float, Tensor, Tensor], Tensor]
"""Maps (x [N, H, A], weight [A], eps, cos [N, R], sin [N, R]) to the normalised and turned heads [N, H, A]."""
Gate = Callable[[Tensor, Tensor], Tensor]
"""Maps (o [N, H, A], gate [N, H]) to the gated output [N, H, A]."""


def block_size(group: int, longest: int, window: int | None) -> int:
    """Return the number of queries in a block, a multiple of 16.

    Sliding window: the window's size, so that at most half of a block's scores are hidden, but at least 64, because
    small blocks cost more to start than to compute, and at most 128. Full attention: a number that keeps the scores of
    a block and a KV head, over `longest` keys, below 2M.
    """
    if window is not None:
        return min(max(-(-window // 16) * 16, 64), 128)
    rows = 128
    while rows > 16 and rows * group * longest > 2**21:
        rows //= 2
    return rows


def use_flash(q_NHA: Tensor) -> bool:
    """Return whether these queries are served by PyTorch's flash attention instead of blocks.

    The meta device, on which memory is counted, stands for a GPU.
    """
    return q_NHA.device.type in ("cuda", "meta") and q_NHA.dtype in (torch.bfloat16, torch.float16)


def choose_attention(
    name: AttentionBackend,
    device: torch.device,
    precision: Precision,
    head_dim: int,
    kinds: Sequence[AttentionConfig],
) -> None:
    """Make torch use this flash attention in the whole process, and try it on a few tokens of each kind of attention,
    forward and backward. Raises `RecipeError` if it cannot run here."""
    if implementations.current_flash_attention_impl() is not None:
        implementations.restore_flash_attention_impl()
    if name == "auto":
        return
    try:
        if device.type != "cuda" or precision != "bf16":
            raise RuntimeError(f"{precision} on {device.type} has one implementation, which is no flash attention")
        if name != "fa2":
            implementations.activate_flash_attention_impl(name.upper())
        for kind in kinds:
            _try_flash(kind, head_dim, device)
    except Exception as error:  # the packages raise all kinds of errors
        if implementations.current_flash_attention_impl() is not None:
            implementations.restore_flash_attention_impl()
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(
            f"kernels.attention={name} cannot run here: {reason}; choose auto, which takes what torch has"
        ) from error


def _try_flash(kind: AttentionConfig, head_dim: int, device: torch.device) -> None:
    q, k, v = (
        torch.ones(16, heads, head_dim, dtype=torch.bfloat16, device=device, requires_grad=True)
        for heads in (kind.num_heads, kind.num_kv_heads, kind.num_kv_heads)
    )
    cu = torch.tensor([0, 9, 16], dtype=torch.int32, device=device)
    _flash(q, k, v, (cu, cu), (9, 9), kind.window).sum().backward()
    torch.cuda.synchronize(device)


def _flash(
    q_NHA: Tensor, k_MKA: Tensor, v_MKA: Tensor, cu: tuple[Tensor, Tensor], longest: tuple[int, int], window: int | None
) -> Tensor:
    before = -1 if window is None else window - 1  # keys besides the query's own; −1: all
    return flash_attention(q_NHA, k_MKA, v_MKA, *cu, longest, window_size=(before, 0))


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
    """Attend causally within each document, with scale A^−½; query head h reads KV head h // (H / K)."""
    return _attend(q_NHA, k_NKA, v_NKA, packing, None)


def sliding_attention(
    q_NHA: Float[Tensor, "N H A"],
    k_NKA: Float[Tensor, "N K A"],
    v_NKA: Float[Tensor, "N K A"],
    packing: Packing,
    window: int,
) -> Float[Tensor, "N H A"]:
    """Attend like `full_attention`, but each query sees only the last `window` keys, its own included.

    The cost is O(N · window).
    """
    return _attend(q_NHA, k_NKA, v_NKA, packing, window)


def span_attention(
    q_NHA: Float[Tensor, "N H A"],
    k_MKA: Float[Tensor, "M K A"],
    v_MKA: Float[Tensor, "M K A"],
    spans: tuple[Span, ...],
    borders: tuple[int, ...],
    window: int | None,
) -> Float[Tensor, "N H A"]:
    """Attend with some of the queries only: the queries of a span (start, stop, key) belong to the keys from `key` on.

    Each document holds the keys from one of the `borders` to the next (0 first, M last). Spans are ascending in queries
    and in keys, and together they cover all queries.
    """
    longest = max(stop - start for start, stop in pairwise(borders))
    if use_flash(q_NHA):
        cu_queries_S, cu_keys_S, longest_queries = _queries_and_keys(spans, borders, q_NHA.device)
        return _flash(q_NHA, k_MKA, v_MKA, (cu_queries_S, cu_keys_S), (longest_queries, longest), window)
    return _blocks(q_NHA, k_MKA, v_MKA, spans, borders, longest, window)


def queries_before(spans: tuple[Span, ...], borders: tuple[int, ...]) -> tuple[int, ...]:
    """Return, for each border among the keys, how many queries belong to keys before it."""
    return tuple(
        sum(min(max(border - key, 0), stop - start) for start, stop, key in spans if key < border) for border in borders
    )


@lru_cache(maxsize=8)
def _queries_and_keys(
    spans: tuple[Span, ...], borders: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """Return the start of each document's queries and of its keys, int32, and the most queries of a document."""
    queries = queries_before(spans, borders)
    cu_queries_S, cu_keys_S = (torch.tensor(cu, dtype=torch.int32, device=device) for cu in (queries, borders))
    return cu_queries_S, cu_keys_S, max(stop - start for start, stop in pairwise(queries))


def norm_and_turn(
    x_NHA: Float[Tensor, "N H A"],
    weight_A: Float[Tensor, "A"],
    eps: float,
    cos_NR: Float[Tensor, "N R"],
    sin_NR: Float[Tensor, "N R"],
) -> Float[Tensor, "N H A"]:
    """Return the RMSNorm of each head, with its first 2R channels then turned by the angles of its token."""
    return apply_rope(rms_norm(x_NHA, weight_A, eps), cos_NR, sin_NR)


def gate_heads(o_NHA: Float[Tensor, "N H A"], gate_NH: Float[Tensor, "N H"]) -> Float[Tensor, "N H A"]:
    """Return the output of each head times the sigmoid of its gate."""
    return o_NHA * gate_NH.sigmoid().unsqueeze(-1)


class Attention(nn.Module):
    """One attention layer; `config.window` selects its initial kernel."""

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
        self.turn: Turn = norm_and_turn
        self.gate: Gate = gate_heads

    def forward(self, x_BTD: Tensor, packing: Packing, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Map [B, T, D] to [B, T, D]. `rope` is cos and sin [N, R] of the packing's positions."""
        x_ND = x_BTD.flatten(0, 1)
        # The projections determine the number of heads: under tensor parallelism it is this rank's share.
        q_NHA = self.q_proj(x_ND).unflatten(-1, (-1, self.head_dim))
        k_NKA = self.k_proj(x_ND).unflatten(-1, (-1, self.head_dim))
        v_NKA = self.v_proj(x_ND).unflatten(-1, (-1, self.head_dim))
        q_NHA = self.turn(q_NHA, local(self.q_norm.weight), self.q_norm.eps, *rope)
        k_NKA = self.turn(k_NKA, local(self.k_norm.weight), self.k_norm.eps, *rope)
        o_NHA = self.kernel(q_NHA, k_NKA, v_NKA, packing)
        gated_NHA = self.gate(o_NHA, self.gate_proj(x_ND))
        return self.o_proj(gated_NHA.flatten(1)).view(x_BTD.shape)
