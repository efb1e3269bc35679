"""Run the code for GPUs without one: its operators on tensors without values, and an expert layer that is counted.

A tensor on the meta device, or a fake one on a CUDA device, has a shape and a dtype, but no values. So this shows that
the installed torch has every operator that only GPUs run, takes the arguments as they are given, and returns the shapes
that the code expects. Autograd runs on the meta device only: fake CUDA tensors would need a driver for it.

Legend: N tokens, H query heads, K KV heads, A head_dim, D hidden, V vocabulary, E experts, I expert FFN, P rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import gpu_count
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gpu_parts.rows import Given, Row, guarded, judged, not_run
from steptron import torch_internals
from steptron.config.resolve import resolve
from steptron.nn.attention import full_attention, sliding_attention, span_attention
from steptron.nn.loss import chunked_log_probs
from steptron.nn.packing import Packing
from steptron.optim.muon import orthogonalise
from steptron.parallel.cp import SplitRows, plan_ring
from steptron.parallel.ring import FlashEngine

BF16 = torch.bfloat16
NEED_CUDA_BUILD = ("attention on fake CUDA", "ring", "loss")
CAPABILITY = (9, 0)
"""The compute capability that fake CUDA tensors have: that of Hopper."""
EP, TOKENS = 8, 4096
"""The layout at which the goals of gpu_count.py are set."""


def fake(given: Given) -> Iterator[Row]:
    """Yield for each operator the number of results with another shape or dtype than expected; then the counts."""
    checks: dict[str, Callable[[], Iterator[Row]]] = {
        "attention on meta": partial(_attention, "meta"),
        "attention on fake CUDA": partial(_attention, "cuda"),
        "ring": _ring,
        "loss": _loss,
        "grouped product": _grouped,
        "orthogonalisation": _orthogonalise,
    }
    for name, check in checks.items():
        if name in NEED_CUDA_BUILD and not torch.backends.cuda.is_built():
            yield not_run(name, "this torch is built without CUDA, and cannot slice a fake CUDA tensor")
        else:
            yield from guarded(name, check)
    torch_internals._flash_sizes.cache_clear()  # of fake tensors
    yield from guarded("an expert layer counted", _counted)


def unlike(name: str, got: Sequence[Tensor], like: Sequence[Tensor]) -> Row:
    """Return the row of the number of tensors whose shape, dtype or device differ."""
    pairs = zip(got, like, strict=True)
    wrong = sum((a.shape, a.dtype, a.device.type) != (b.shape, b.dtype, b.device.type) for a, b in pairs)
    return judged(f"{name}: results of another shape or dtype", float(wrong), 0.0)


def empty(*shape: int, dtype: torch.dtype = BF16, device: str = "cuda") -> Tensor:
    """Return a tensor without values."""
    return torch.empty(*shape, dtype=dtype, device=device)


def hopper() -> Any:
    """Replace the question for the device's capability, which needs a driver. torch 2.15 chooses its kernel by it."""
    return patch.object(torch.cuda, "get_device_capability", lambda *_: CAPABILITY)


def _attention(device: str) -> Iterator[Row]:
    """Run the public kernels: forward and, on meta, backward."""
    packing = Packing.from_documents(torch.arange(5).repeat_interleave(64).view(1, -1))
    spans, borders = ((0, 40, 31), (40, 41, 90)), (0, 71, 320)
    with FakeTensorMode(allow_non_fake_inputs=True), hopper():
        q, k, v = (empty(320, heads, 128, device=device) for heads in (64, 8, 8))
        packing = replace(packing, cu_seqlens_S=empty(6, dtype=torch.int32, device=device))
        calls: dict[str, tuple[Tensor, Callable[..., Tensor]]] = {
            "full attention": (q, partial(full_attention, packing=packing)),
            "sliding attention": (q, partial(sliding_attention, packing=packing, window=512)),
            "fewer queries than keys": (q[:41], partial(span_attention, spans=spans, borders=borders, window=512)),
        }
        for name, (queries, kernel) in calls.items():
            inputs = [t.detach().requires_grad_(device == "meta") for t in (queries, k, v)]
            out = kernel(*inputs)
            grads = torch.autograd.grad(out, inputs, out) if device == "meta" else ()
            yield unlike(f"{device}: {name}", (out, *grads), (queries, *inputs[: len(grads)]))


def _ring() -> Iterator[Row]:
    """Run the engine for GPUs of a rank, forward and backward."""
    borders = (0, 100, 256)
    with FakeTensorMode():
        q, k, v = (empty(64, heads, 128) for heads in (16, 2, 2))
        engine = FlashEngine(q, plan_ring(borders, SplitRows(1, 256, 4, 1)))
        kv = engine.pack(k, v)
        for step in range(4):
            engine.forward(kv, step)
        o, lse = engine.output()
        engine.start_backward(o, lse, o)
        total = sum((engine.backward(kv, step) for step in range(4)), torch.zeros((), device="cuda"))
        yield unlike("cuda: ring", (o, lse, *engine.gradients(total)), (q, empty(16, 64, dtype=torch.float32), q, k, v))


def _loss() -> Iterator[Row]:
    """Multiply bf16 into fp32 logits."""
    with FakeTensorMode():
        x, weight, targets = empty(100, 64), empty(1000, 64), empty(100, dtype=torch.int64)
        found = chunked_log_probs(x, weight, None, targets_N=targets, chunk=32)
        yield unlike("cuda: logits of bf16 in fp32", [found], [empty(100, dtype=torch.float32)])


def _grouped() -> Iterator[Row]:
    """Multiply rows by group: on fake CUDA forward, on meta backward too."""
    for device in ("cuda", "meta"):
        with FakeTensorMode():
            rows, weights = empty(160, 64, device=device), empty(4, 32, 64, device=device)
            inputs = [t.requires_grad_(device == "meta") for t in (rows, weights)]
            out = F.grouped_mm(rows, weights.mT, offs=empty(4, dtype=torch.int32, device=device))
            grads = torch.autograd.grad(out, inputs, out) if device == "meta" else ()
            yield unlike(
                f"{device}: grouped product", (out, *grads), (empty(160, 32, device=device), *inputs[: len(grads)])
            )


def _orthogonalise() -> Iterator[Row]:
    """Multiply in fp16."""
    with FakeTensorMode():
        x = empty(3, 20, 30, dtype=torch.float32)
        yield unlike("cuda: orthogonalisation", [orthogonalise(x)], [x])


def _counted() -> Iterator[Row]:
    """Yield the counts of an expert layer of the 196B model beside their goals (gpu_count.py)."""
    choices = TOKENS * resolve("step3p5_flash").model.moe.top_k
    for kind, watched, capacity in gpu_count.KINDS:
        allowed = gpu_count.goals(capacity)
        for name, figure in gpu_count.count_layer(EP, TOKENS, watched, capacity).figures(choices).items():
            yield judged(f"an expert layer at EP {EP}, {kind}: {name}", float(figure), float(allowed[name]))
