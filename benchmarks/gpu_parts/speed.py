"""The roofs of the device, and each kernel beside its roof, at the widths of the 196B model and 4,096 tokens.

A figure is the median of many calls by CUDA events. Operations are those that the result needs, without padding; a
backward pass of a product counts twice its forward. Bytes are those of the tensors that must be read and written once.
On the CPU sizes are small, and the figures mean nothing: they show that the code runs.

Legend: N tokens, D hidden, H query heads, K KV heads, A head_dim, E experts, I expert FFN, P rows, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from choices import planned  # pyright: ignore[reportMissingImports]  (tests/moe)
from torch import Tensor, nn

from gpu_parts.rows import Given, Row, guarded, seconds_of
from steptron.moe.dispatch import gather_rows, sum_rows
from steptron.moe.elementwise import make_moe_kernels
from steptron.moe.grouped_experts import torch_swiglu
from steptron.moe.router import route
from steptron.moe.stats import SwigluRows
from steptron.nn.attention import full_attention, sliding_attention
from steptron.nn.elementwise import Chosen, make_layer_kernels
from steptron.nn.loss import chunked_loss, cross_entropy
from steptron.nn.packing import Packing
from steptron.nn.rope import rope_frequencies, rope_tables
from steptron.optim.adamw import AdamW
from steptron.optim.muon import POLAR_EXPRESS, orthogonalise

BF16 = torch.bfloat16
NAMES: tuple[Chosen, ...] = ("torch", "triton")
"""The element-wise kernels, in turn."""


class Sizes:
    """The sizes of a layer of the 196B model on a rank at EP 8; small ones on the CPU."""

    def __init__(self, given: Given) -> None:
        self.N, self.D, self.I, self.E, self.top_k = given.pick((4096, 4096, 1280, 36, 8), (64, 32, 24, 6, 2))
        self.A, self.V, self.window = given.pick((128, 128_896, 512), (16, 100, 16))
        self.rows = given.pick((128, 256, 512, 1024, 2048, 4096), (16, 32))
        self.chunks = given.pick((256, 512, 1024, 2048, 4096), (16, 64))


def probe(given: Given) -> Iterator[Row]:
    """Yield the facts of the device. It fails if CUDA does not start in this process."""
    facts = torch.cuda.get_device_properties(0)
    name = f"{facts.name}, capability {facts.major}.{facts.minor}, CUDA {torch.version.cuda}"
    yield Row(name, facts.total_memory / 2**30, "GiB")
    yield Row("sum of 8 ones", float(torch.ones(8, device=given.device).sum()))


def roofs(given: Given) -> Iterator[Row]:
    """Yield the speed of a large bf16 product of random values, and of a copy within the device's memory."""
    size, elements = given.pick((8192, 1 << 30), (256, 1 << 16))
    a, b = torch.randn(2, size, size, device=given.device).to(BF16)
    yield Row("bf16 product", 2 * size**3 / seconds_of(given, lambda: torch.mm(a, b)) / 1e12, "TFLOP/s")
    source = torch.randn(elements, device=given.device).to(BF16)
    target = torch.empty_like(source)
    yield Row("copy", 2 * source.nbytes / seconds_of(given, lambda: target.copy_(source)) / 1e9, "GB/s")


def speed(given: Given) -> Iterator[Row]:
    """Yield the speed of each kernel, forward, and backward where it has a backward of its own."""
    checks: tuple[Callable[[Given, Sizes], Iterator[Row]], ...] = (
        _grouped,
        _attention,
        _swiglu,
        _permute,
        _layer,
        _statistics,
        _loss,
        _orthogonalise,
        _adamw,
    )
    for check in checks:
        yield from guarded(check.__name__.strip("_"), partial(check, given, Sizes(given)))


def operations(given: Given, name: str, count: float, function: Callable[[], object]) -> Row:
    """Return the row of a function's operations per second, beside the product's."""
    roof = given.flops / 1e12 if given.flops else None
    return Row(name, count / seconds_of(given, function) / 1e12, "TFLOP/s", roof)


def moved(given: Given, name: str, tensors: Sequence[Tensor], function: Callable[[], object]) -> Row:
    """Return the row of a function's bytes per second, beside a copy's. `tensors`: those read and those written."""
    roof = given.bandwidth / 1e9 if given.bandwidth else None
    return Row(name, sum(t.nbytes for t in tensors) / seconds_of(given, function) / 1e9, "GB/s", roof)


def leaf(given: Given, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Return random values with a gradient."""
    return torch.randn(*shape, device=given.device).to(dtype).requires_grad_()


def _grouped(given: Given, s: Sizes) -> Iterator[Row]:
    weights = leaf(given, s.E, s.I, s.D)
    for rows in s.rows:
        x, grad = leaf(given, rows * s.E, s.D), torch.randn(rows * s.E, s.I, device=given.device).to(BF16)
        ends = torch.arange(1, s.E + 1, device=given.device, dtype=torch.int32) * rows
        product = partial(F.grouped_mm, x, weights.mT, offs=ends)
        flops = 2 * rows * s.E * s.D * s.I
        with torch.no_grad():
            yield operations(given, f"grouped product, {rows} rows an expert, forward", flops, product)
        out = product()
        both = partial(torch.autograd.grad, out, [x, weights], grad, retain_graph=True)
        yield operations(given, f"grouped product, {rows} rows an expert, backward", 2 * flops, both)
        del out, both, x, grad


def _attention(given: Given, s: Sizes) -> Iterator[Row]:
    packing = Packing.from_documents(torch.zeros(1, s.N, dtype=torch.long)).to(given.device)
    for heads, window in ((64, None), (96, s.window)):
        q, k, v = leaf(given, s.N, heads, s.A), leaf(given, s.N, 8, s.A), leaf(given, s.N, 8, s.A)
        ours = partial(full_attention if window is None else partial(sliding_attention, window=window), packing=packing)
        seen = sum(min(n + 1, window or s.N) for n in range(s.N))
        flops, name = 4 * heads * s.A * seen, "full 64:8" if window is None else f"sliding {window} 96:8"
        with torch.no_grad():
            yield operations(given, f"attention {name}, forward", flops, partial(ours, q, k, v))
        out = ours(q, k, v)
        both = partial(torch.autograd.grad, out, [q, k, v], torch.randn_like(out), retain_graph=True)
        yield operations(given, f"attention {name}, backward", 2.5 * flops, both)


def _swiglu(given: Given, s: Sizes) -> Iterator[Row]:
    from steptron.moe.swiglu_triton import triton_swiglu  # after the choice of Triton's interpreter

    rows = s.N * s.top_k
    gate, up, grad = (
        leaf(given, rows, s.I),
        leaf(given, rows, s.I),
        torch.randn(rows, s.I, device=given.device).to(BF16),
    )
    weights = torch.rand(rows, device=given.device, requires_grad=True)
    seen = torch.empty(len(SwigluRows._fields), rows, device=given.device)
    for name, function in (("triton", triton_swiglu), ("torch", torch_swiglu)):
        for what, stats in (("", None), (", statistics", seen)):
            with torch.no_grad():
                call = partial(function, gate, up, weights, 7.0, stats)
                yield moved(given, f"SwiGLU {name}{what}, forward", (gate, up, grad), call)
        out = function(gate, up, weights, 7.0, None)
        both = partial(torch.autograd.grad, out, [gate, up, weights], grad, retain_graph=True)
        yield moved(given, f"SwiGLU {name}, backward", (gate, up, grad, gate, up), both)


def _permute(given: Given, s: Sizes) -> Iterator[Row]:
    choice = torch.rand(s.N, s.E, device=given.device).argsort(1)[:, : s.top_k]
    plan, x = planned(choice, s.E, exact=False), leaf(given, s.N, s.D)
    y = gather_rows(x.detach(), plan.rows)
    for by in NAMES:
        kernels = make_moe_kernels(by)
        gather, add = (partial(f, rows=plan.rows, by=kernels.moves) for f in (gather_rows, sum_rows))
        make_plan = partial(kernels.plan, choice, s.E, None, False)
        with torch.no_grad():
            yield moved(given, f"permute {by}: rows of tokens", (x, y), partial(gather, x))
            yield moved(given, f"unpermute {by}: sum of rows", (x, y), partial(add, y))
            yield moved(given, f"plan of rows {by}", (choice, *plan.rows[:2]), make_plan)


def _layer(given: Given, s: Sizes) -> Iterator[Row]:
    """Time norm, q norm with RoPE, and gate, forward and backward."""
    cos, sin = rope_tables(torch.arange(s.N, device=given.device), rope_frequencies(s.A, 1.0, 1e4, None))
    shapes = ((s.N, s.D), (s.D,), (s.N, 96, s.A), (s.A,), (s.N, 96))
    x, weight, q, of_head, gate = (leaf(given, *shape) for shape in shapes)
    for by in NAMES:
        norm, turn, gated = make_layer_kernels(by)
        calls = {
            "norm": (partial(norm, x, weight, 1e-5), [x, weight]),
            "q norm and RoPE": (partial(turn, q, of_head, 1e-5, cos, sin), [q, of_head]),
            "gate": (partial(gated, q, gate), [q, gate]),
        }
        for name, (call, inputs) in calls.items():
            with torch.no_grad():
                yield moved(given, f"{name} {by}, forward", (inputs[0],) * 2, call)
            out = call()
            both = partial(torch.autograd.grad, out, inputs, torch.randn_like(out), retain_graph=True)
            yield moved(given, f"{name} {by}, backward", (inputs[0],) * 3, both)


def _statistics(given: Given, s: Sizes) -> Iterator[Row]:
    """Time the statistics of the router and the shared expert, and the norms of results."""
    x, weight = torch.randn(s.N, s.D, device=given.device), torch.randn(8 * s.E, s.D, device=given.device) * s.D**-0.5
    bias = torch.zeros(8 * s.E, device=given.device)
    routing = route(x, weight, bias, s.top_k, 3.0)
    gate, up, y, z = (leaf(given, s.N, width).detach() for width in (s.I, s.I, s.D, s.D))
    for by in NAMES:
        kernels = make_moe_kernels(by)
        yield moved(given, f"router statistics {by}", routing, partial(kernels.router_stats, routing, bias))
        yield moved(given, f"shared statistics {by}", (gate, up), partial(kernels.shared_stats, gate, up, 16.0))
        yield moved(given, f"norms of results {by}", (y, z), partial(kernels.sums_of_norms, y, z))


def _loss(given: Given, s: Sizes) -> Iterator[Row]:
    x, weight = leaf(given, s.N, s.D), leaf(given, s.V, s.D)
    targets, weights = torch.randint(s.V, (s.N,), device=given.device), torch.ones(s.N, device=given.device)
    constants = torch.zeros(0, s.N, device=given.device)
    for chunk in s.chunks:
        call = partial(
            chunked_loss,
            x,
            weight,
            None,
            targets_N=targets,
            weights_N=weights,
            constants_KN=constants,
            rule=cross_entropy,
            chunk=chunk,
        )
        yield operations(given, f"loss and both gradients, chunks of {chunk}", 6 * s.N * s.D * s.V, call)


def _orthogonalise(given: Given, s: Sizes) -> Iterator[Row]:
    """Time as many matrices as Muon takes at a time."""
    for rows, columns, count in ((s.I, s.D, 1), (s.I, s.D, 8), (s.D, s.D, 1)):
        x = torch.randn(count, rows, columns, device=given.device)
        flops = count * len(POLAR_EXPRESS) * (4 * rows**2 * columns + 2 * rows**3)
        name = f"orthogonalisation of {count} × {rows} × {columns}"
        yield operations(given, name, flops, partial(orthogonalise, x))


def _adamw(given: Given, s: Sizes) -> Iterator[Row]:
    p = nn.Parameter(torch.randn(given.pick(1 << 28, 1 << 12), device=given.device))
    p.grad = torch.randn_like(p)
    optimizer = AdamW.of({"p": p}, 0.1, 0.9, 0.95, 1e-8)
    yield moved(given, "AdamW", (p,) * 7, lambda: optimizer.step(1e-4))
