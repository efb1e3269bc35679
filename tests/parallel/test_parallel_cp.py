"""Context parallelism on gloo ranks against one process' attention: outputs and gradients, documents and windows of every kind."""

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from steptron.config.schema import AttentionConfig
from steptron.nn.attention import Attention
from steptron.nn.packing import Packing
from steptron.nn.rope import rope_frequencies, rope_tables
from steptron.parallel import cp
from tests.ranks import run_ranks

HEADS, KV_HEADS, WIDTH, TOKENS = 4, 2, 8, 96
WINDOWS = [1, 2, 5, 13, 30, 200]
"""At 2 and 4 ranks a chunk has 24 and 12 tokens: inside it, one key over its length, over several chunks, over the row."""
DOCUMENTS = ["one", "short", "chunks", "mixed"]


def documents_of(kind: str, rows: int, tokens: int) -> Tensor:
    """`chunks`: a border at every second chunk of 4 ranks; `mixed`: few long ones, and a border at the middle of the first row."""
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
    """Largest difference of o and the gradients of q, k and v, each relative to the largest value, at this rank's tokens."""
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


def all_errors(_rank: int) -> dict[tuple, float]:
    fp32, fp64 = torch.float32, torch.float64
    cases = [(kind, rows, TOKENS, w, "ring", fp64) for kind, rows, w in product(DOCUMENTS, (1, 2), WINDOWS)]
    for method in ("ring", "all_gather"):
        cases += [(kind, rows, TOKENS, None, method, fp64) for kind, rows in product(DOCUMENTS, (1, 2))]
        cases += [("mixed", 2, TOKENS, None, method, dtype) for dtype in (fp32, torch.bfloat16)]
        cases += [("mixed", 1, 2400, None, method, fp32), ("short", 1, 2400, None, method, fp32)]
    cases += [("mixed", 2, TOKENS, 5, "ring", dtype) for dtype in (fp32, torch.bfloat16)]
    cases += [(kind, 1, 2400, w, "ring", fp32) for kind in ("mixed", "short") for w in (128, 700)]
    return {case: error_of(*case) for case in cases}


@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_one_process(tmp_path: Path, ranks: int):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}
    for errors in run_ranks(ranks, all_errors, tmp_path):
        assert {case: error for case, error in errors.items() if error > tolerance[case[-1]]} == {}
