"""Parity of attention: the public kernels of nn/attention.py, and the ring of parallel/ring.py without its transfers.

Legend: N tokens, M keys, H query heads, K KV heads, A head_dim.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from gpu_parts import reference
from gpu_parts.reference import exact, with_gradients
from gpu_parts.rows import BOUNDS, Given, Row, compared, error, guarded, judged
from steptron.nn.attention import full_attention, sliding_attention, span_attention, use_flash
from steptron.nn.packing import Packing
from steptron.parallel.cp import SplitRows, plan_ring
from steptron.parallel.ring import BlockEngine, FlashEngine, RingMath

HEADS = {"64:8": (64, 8), "96:8": (96, 8)}
"""Query and KV heads of the full and of the sliding layers of the 196B model."""
TOLD_APART = 0.5
"""The largest error of a sliding result, as a share of its distance from windows of one key more and one less."""


def random_qkv(given: Given, queries: int, keys: int, heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v and the gradient of the result, on the device; width 128 on CUDA, 16 on the CPU."""
    generator, width = torch.Generator().manual_seed(queries + keys), given.pick(128, 16)
    sizes = ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]), (queries, heads[0]))
    return [torch.randn(n, h, width, generator=generator).to(given.device, dtype) for n, h in sizes]


def dtypes(given: Given) -> tuple[torch.dtype, ...]:
    """Return the dtypes that are compared: bf16 (flash attention) and fp32 (blocks) on CUDA, fp32 on the CPU."""
    return given.pick((torch.bfloat16, torch.float32), (torch.float32,))


def attention(given: Given) -> Iterator[Row]:
    """Yield the errors of full and sliding attention, packed, and of fewer queries than keys; of all gradients too."""
    for dtype in dtypes(given):
        yield from parity(given, dtype)


def parity(given: Given, dtype: torch.dtype) -> Iterator[Row]:
    """Yield these errors in one dtype."""
    checks: dict[str, Callable[[], Iterator[Row]]] = {
        "full 64:8": partial(_packed, given, "64:8", None, dtype),
        "sliding 96:8": partial(_packed, given, "96:8", given.pick(512, 32), dtype),
        "window ± 1": partial(_windows, given, dtype),
        "fewer queries than keys": partial(_spans, given, None, dtype),
        "fewer queries than keys, sliding": partial(_spans, given, 20, dtype),
    }
    for name, check in checks.items():
        yield from guarded(f"{name}, {dtype}", check)


def packed(given: Given) -> Packing:
    """Return documents of 1, 2, some and many tokens in two rows."""
    lengths = given.pick(((1, 2, 77, 1200), (1279, 1)), ((1, 2, 29, 96), (127, 1)))
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    return Packing.from_documents(torch.stack(rows)).to(given.device)


def kernel(packing: Packing, window: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the public function for this window."""
    if window is None:
        return lambda q, k, v: full_attention(q, k, v, packing)
    return lambda q, k, v: sliding_attention(q, k, v, packing, window)


def _packed(given: Given, heads: str, window: int | None, dtype: torch.dtype) -> Iterator[Row]:
    packing = packed(given)
    borders = packing.cu_seqlens
    *inputs, grad = random_qkv(given, borders[-1], borders[-1], HEADS[heads], dtype)
    got = with_gradients(kernel(packing, window), [x.requires_grad_() for x in inputs], grad)
    plain = partial(reference.attention, places=range(borders[-1]), borders=borders, window=window)
    want = with_gradients(plain, exact(inputs), grad.cpu())
    engine = "flash" if use_flash(inputs[0]) else "blocks"
    kind = "full" if window is None else f"sliding {window}"
    yield compared(f"{kind} {heads}, {engine} {dtype}: o, dq, dk, dv", got, want, BOUNDS[dtype])


def _windows(given: Given, dtype: torch.dtype) -> Iterator[Row]:
    """Yield the error at windows around the borders of kernels' tiles, over the distance from windows next to them."""
    tokens = given.pick(700, 150)
    packing = Packing.from_documents(torch.zeros(1, tokens, dtype=torch.long)).to(given.device)
    *inputs, _ = random_qkv(given, tokens, tokens, (8, 2), dtype)
    for window in given.pick((1, 2, 127, 128, 129, 512), (1, 2, 16, 65)):
        got = kernel(packing, window)(*inputs)
        near = [
            reference.attention(*exact(inputs), places=range(tokens), borders=(0, tokens), window=window + shift)
            for shift in (0, 1, *([-1] if window > 1 else []))
        ]
        apart = error(got, near[0]) / min(error(other, near[0]) for other in near[1:])
        yield judged(f"window {window} told from ± 1, {dtype}", apart, TOLD_APART)


def _spans(given: Given, window: int | None, dtype: torch.dtype) -> Iterator[Row]:
    """Yield the error where only some tokens of the documents are queries: the halo and the gathered keys of cp."""
    spans, borders = ((0, 40, 31), (40, 41, 90), (41, 300, 141)), (0, 7, 50, 71, 91, 150, 160, 290, 400)
    places = [key + i for start, stop, key in spans for i in range(stop - start)]
    *inputs, grad = random_qkv(given, 300, 400, (8, 2), dtype)
    ours = partial(span_attention, spans=spans, borders=borders, window=window)
    got = with_gradients(ours, [x.requires_grad_() for x in inputs], grad)
    plain = partial(reference.attention, places=places, borders=borders, window=window)
    want = with_gradients(plain, exact(inputs), grad.cpu())
    yield compared(f"300 queries of 400 keys, window {window}, {dtype}: o, dq, dk, dv", got, want, BOUNDS[dtype])


def ring(given: Given) -> Iterator[Row]:
    """Yield the errors of the ring: 1 and 4 simulated ranks whose keys travel in turn through one process."""
    for dtype in dtypes(given):
        for ranks in (1, 4):
            for documents in ("one", "many"):
                check = partial(_ring, given, ranks, documents, dtype)
                yield from guarded(f"ring of {ranks}, {documents}, {dtype}", check)


def _ring(given: Given, ranks: int, documents: str, dtype: torch.dtype) -> Iterator[Row]:
    length = given.pick(512, 64)
    starts = torch.zeros(2, length, dtype=torch.long)
    if documents == "many":
        starts[0, [3, length // 2, length // 2 + 1]] = 1
        starts[1, length // 7] = 1
    borders = Packing.from_documents(starts.cumsum(1)).cu_seqlens
    *inputs, grad = random_qkv(given, 2 * length, 2 * length, (16, 2), dtype)
    got = _whole_ring(inputs, grad, borders, length, ranks)
    plain = partial(reference.attention, places=range(2 * length), borders=borders, window=None)
    want = with_gradients(plain, exact(inputs), grad.cpu())
    engine = "flash" if use_flash(inputs[0]) else "blocks"
    name = f"{ranks} rank{'s' * (ranks > 1)}, {documents} document{'s' * (documents == 'many')}, {engine} {dtype}"
    yield compared(f"{name}: o, dq, dk, dv", got, want, BOUNDS[dtype])


def _whole_ring(inputs: list[Tensor], grad: Tensor, borders: tuple[int, ...], length: int, ranks: int) -> list[Tensor]:
    """Return o and the gradients of q, k and v of all tokens, from what each simulated rank computes of its pieces."""
    places = [SplitRows(2, length, ranks, rank) for rank in range(ranks)]
    chosen = [
        torch.cat([torch.arange(row + a, row + b) for row in (0, length) for a, b in place.pieces(place.rank)])
        for place in places
    ]
    engines = [
        _engine(inputs[0][mine], inputs[1].shape[1], borders, place) for mine, place in zip(chosen, places, strict=True)
    ]
    kv = [engine.pack(inputs[1][mine], inputs[2][mine]) for engine, mine in zip(engines, chosen, strict=True)]
    for rank, engine in enumerate(engines):
        for step in range(ranks):
            engine.forward(kv[(rank - step) % ranks], step)
    results = [torch.empty_like(x) for x in (inputs[0], *inputs)]
    sums: list[Tensor | None] = [None] * ranks
    outputs = [engine.output() for engine in engines]
    for rank, (engine, (o, lse)) in enumerate(zip(engines, outputs, strict=True)):
        results[0][chosen[rank]] = o
        engine.start_backward(o, lse, grad[chosen[rank]])
        for step in range(ranks):
            owner = (rank - step) % ranks
            part, before = engine.backward(kv[owner], step), sums[owner]
            sums[owner] = part if before is None else before + part
    for mine, engine, total in zip(chosen, engines, sums, strict=True):
        assert total is not None, "each rank's keys were seen by all ranks"
        for result, part in zip(results[1:], engine.gradients(total), strict=True):
            result[mine] = part
    return results


def _engine(q_NHA: Tensor, kv_heads: int, borders: tuple[int, ...], place: SplitRows) -> RingMath:
    plan = plan_ring(borders, place)
    return FlashEngine(q_NHA, plan) if use_flash(q_NHA) else BlockEngine(q_NHA, kv_heads, plan)
