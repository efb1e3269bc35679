"""Context parallelism on gloo ranks against one process' attention: outputs and gradients, documents and windows of
every kind."""

from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from steptron import torch_internals
from steptron.config.schema import AttentionConfig
from steptron.nn.attention import Attention
from steptron.nn.packing import Packing
from steptron.nn.rope import rope_frequencies, rope_tables
from steptron.parallel import cp, ring
from tests.ranks import run_ranks
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

HEADS, KV_HEADS, WIDTH, TOKENS = 4, 2, 8, 96
WINDOWS = [1, 2, 5, 13, 30, 200]
"""At 2 and 4 ranks a chunk has 24 and 12 tokens: inside it, one key over its length, over several chunks, over the
row."""
DOCUMENTS = ["one", "short", "chunks", "mixed"]


def documents_of(kind: str, rows: int, tokens: int) -> Tensor:
    """`chunks`: a border at every second chunk of 4 ranks; `mixed`: few long ones, and a border at the middle of the
    first row."""
    generator = torch.Generator().manual_seed(rows * tokens)
    starts = torch.zeros(rows, tokens, dtype=torch.long)
    if kind == "short":
        starts[torch.rand(rows, tokens, generator=generator) < 0.2] = 1
    elif kind == "chunks":
        starts[:, :: tokens // 4] = 1
    elif kind == "mixed":
        starts[0, [tokens // 2, tokens // 2 + 1]] = 1
        starts[-1, tokens // 7] = 1
    return starts.cumsum(1)


def local_of(x: Tensor, packing: Packing) -> Tensor:
    """Tokens of whole rows [B·W, …] → those of this rank's pieces."""
    x_BW = x.unflatten(0, (packing.rows, packing.row_length))
    return torch.cat([x_BW[:, start:stop] for start, stop in packing.pieces], dim=1).flatten(0, 1)


def attention_of(window: int | None) -> Attention:
    return Attention(16, WIDTH, AttentionConfig(num_heads=HEADS, num_kv_heads=KV_HEADS, window=window), 1e-5)


def error_of(kind: str, rows: int, tokens: int, window: int | None, method: cp.Method, dtype: torch.dtype) -> float:
    """Largest difference of o and the gradients of q, k and v, each relative to the largest value, at this rank's
    tokens."""
    documents = documents_of(kind, rows, tokens)
    group, module = dist.group.WORLD, attention_of(window)
    assert group is not None
    pieces = cp.sequence_pieces(tokens, dist.get_world_size(), dist.get_rank())
    whole, packing = Packing.from_documents(documents), Packing.from_documents(documents, pieces)
    torch.manual_seed(1)
    inputs = [torch.randn(rows * tokens, h, WIDTH, dtype=dtype) for h in (HEADS, KV_HEADS, KV_HEADS)]
    grad = torch.randn_like(inputs[0])
    results = []
    for here in (whole, packing):
        if here is packing:
            cp.apply_cp([module], group, method)
        mine = [local_of(x, here).requires_grad_() for x in inputs]
        out = module.kernel(*mine, here)
        results.append([out, *torch.autograd.grad(out, mine, local_of(grad, here))])
    errors = [0.0]
    for expected, got in zip(*results, strict=True):
        expected = local_of(expected, packing)
        assert got.dtype == dtype, "wrong dtype"
        assert got.isfinite().all(), "not finite"
        errors.append(((got - expected).abs().max() / expected.abs().max()).item())
    return max(errors)


def module_error() -> float:
    """Run a complete attention layer with RoPE at the positions that this rank's tokens have in their documents. The
    parameters' gradients are summed over the ranks."""
    documents, group = documents_of("mixed", 2, TOKENS), dist.group.WORLD
    assert group is not None
    pieces = cp.sequence_pieces(TOKENS, dist.get_world_size(), dist.get_rank())
    whole, packing = Packing.from_documents(documents), Packing.from_documents(documents, pieces)
    worst = 0.0
    for window in (None, 20):
        torch.manual_seed(2)
        module, x, grad = attention_of(window).double(), *torch.randn(2, 2, TOKENS, 16, dtype=torch.float64)
        results = []
        for here in (whole, packing):
            if here is packing:
                cp.apply_cp([module], group, "ring")
            rope = rope_tables(here.positions_BT.flatten(), rope_frequencies(WIDTH, 0.5, 1e4, None))
            local_x, local_grad = (local_of(t.flatten(0, 1), here).view(2, -1, 16) for t in (x, grad))
            out = module(local_x, here, rope)
            grads = torch.autograd.grad(out, list(module.parameters()), local_grad)
            if here is packing:
                for g in grads:
                    dist.all_reduce(g)
            results.append([local_of(out.flatten(0, 1), packing) if here is whole else out.flatten(0, 1), *grads])
        for expected, got in zip(*results, strict=True):
            worst = max(worst, ((got - expected).abs().max() / expected.abs().max()).item())
    return worst


def short_halo_error() -> float:
    """What one key too few is seen as."""
    right = cp.halo_length
    cp.halo_length = lambda window: right(window) - 1
    try:
        return error_of("one", 1, TOKENS, 5, "ring", torch.float64)
    finally:
        cp.halo_length = right


def flash_by_hand(q: Tensor, k: Tensor, cu_queries: tuple[int, ...], cu_keys: tuple[int, ...], causal: bool) -> Tensor:
    """Scores [H, Q, J] of what a variable-length flash call is documented to see: the i-th queries the i-th keys, ends
    aligned."""
    scores = torch.full((q.shape[1], len(q), len(k)), -torch.inf)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    for (start, stop), (first_key, stop_key) in zip(pairwise(cu_queries), pairwise(cu_keys), strict=True):
        part = torch.einsum("qha,jha->hqj", q[start:stop], k[first_key:stop_key]) / q.shape[-1] ** 0.5
        late = torch.ones(part.shape[1:], dtype=torch.bool).triu(1 + stop_key - first_key - stop + start)
        scores[:, start:stop, first_key:stop_key] = part.masked_fill(late, -torch.inf) if causal else part
    return scores


def flash_forward_by_hand(q, k, v, cu_queries, cu_keys, causal):
    scores = flash_by_hand(q, k, cu_queries, cu_keys, causal)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return torch.einsum("hqj,jha->qha", scores.softmax(-1), v), scores.logsumexp(-1)


def flash_backward_by_hand(grad_o, q, k, v, o, lse, cu_queries, cu_keys, causal):
    p = (flash_by_hand(q, k, cu_queries, cu_keys, causal) - lse.unsqueeze(-1)).exp()
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    many_k, many_v = (x.repeat_interleave(group, 1) for x in (k, v))
    grad_p = torch.einsum("qha,jha->hqj", grad_o, many_v)
    grad_s = p * (grad_p - (grad_o * o).sum(-1).T.unsqueeze(-1)) * scale
    grad_k, grad_v = torch.einsum("hqj,qha->jha", grad_s, q), torch.einsum("hqj,qha->jha", p, grad_o)
    grads = [x.unflatten(1, (-1, group)).sum(2) for x in (grad_k, grad_v)]
    return torch.einsum("hqj,jha->qha", grad_s, many_k), *grads


def flash_engine_error() -> float:
    """Of the engine for GPUs in fp32, with its two kernels written out by hand."""
    saved = ring.use_flash, ring.flash_forward, ring.flash_backward
    ring.use_flash = lambda q: True
    ring.flash_forward, ring.flash_backward = flash_forward_by_hand, flash_backward_by_hand
    try:
        return max(error_of(kind, 2, TOKENS, None, "ring", torch.float32) for kind in DOCUMENTS)
    finally:
        ring.use_flash, ring.flash_forward, ring.flash_backward = saved


def all_errors(_rank: int) -> tuple[dict[tuple, float], float, float, float]:
    fp32, fp64 = torch.float32, torch.float64
    cases = [(kind, rows, TOKENS, w, "ring", fp64) for kind, rows, w in product(DOCUMENTS, (1, 2), WINDOWS)]
    for method in ("ring", "all_gather"):
        cases += [(kind, rows, TOKENS, None, method, fp64) for kind, rows in product(DOCUMENTS, (1, 2))]
        cases += [("mixed", 2, TOKENS, None, method, dtype) for dtype in (fp32, torch.bfloat16)]
        cases += [("mixed", 1, 2400, None, method, fp32), ("short", 1, 2400, None, method, fp32)]
    cases += [("mixed", 2, TOKENS, 5, "ring", dtype) for dtype in (fp32, torch.bfloat16)]
    cases += [(kind, 1, 2400, w, "ring", fp32) for kind in ("mixed", "short") for w in (128, 700)]
    return {case: error_of(*case) for case in cases}, module_error(), flash_engine_error(), short_halo_error()


@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_one_process(tmp_path: Path, ranks: int):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}
    for rank, (errors, module, flash, short_halo) in enumerate(run_ranks(ranks, all_errors, tmp_path)):
        assert {case: error for case, error in errors.items() if error > tolerance[case[-1]]} == {}
        assert module < 1e-6  # RoPE tables are fp32
        assert flash < 1e-5
        assert short_halo > 1e-3, f"rank {rank} does not notice"


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_pieces_are_the_row_and_equally_heavy(ranks: int):
    pieces = [cp.sequence_pieces(96, ranks, rank) for rank in range(ranks)]
    tokens = [[t for start, stop in mine for t in range(start, stop)] for mine in pieces]
    assert sorted(t for mine in tokens for t in mine) == list(range(96))
    assert len({sum(mine) for mine in tokens}) == 1


def test_flash_calls_fit_the_operators():
    with FakeTensorMode():
        q = torch.empty(64, 8, 128, dtype=torch.bfloat16, device="cuda")
        k, v = torch.empty(2, 48, 2, 128, dtype=torch.bfloat16, device="cuda")
        o, lse = ring.flash_forward(q, k, v, (0, 64), (0, 48), False)
        assert (o.shape, lse.shape, lse.dtype) == (q.shape, (8, 64), torch.float32)
        grads = ring.flash_backward(o, q, k, v, o, lse, (0, 64), (0, 48), False)
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    torch_internals._flash_sizes.cache_clear()  # of fake tensors
