"""Parity of the experts: every back end under every load, with and without a limit, result, gradients and statistics.

The rows after the last group, which `grouped_mm` leaves as they were, are NaN here (tests/moe/unwritten.py): nothing of
them may reach a result.

Legend: N tokens, K choices a token, D hidden, E experts, I expert FFN.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from choices import dispatched  # pyright: ignore[reportMissingImports]  (tests/moe)
from torch import Tensor
from unwritten import unwritten_rows_are_nan  # pyright: ignore[reportMissingImports]  (tests/moe)

from gpu_parts import reference
from gpu_parts.reference import exact
from gpu_parts.rows import BOUNDS, Given, Row, compared, error, guarded, judged, not_run
from steptron.config.kernels import ExpertBackend
from steptron.moe.experts import Experts, make_backend
from steptron.moe.grouped_te import available as transformer_engine

ELSEWHERE = -1
LIMITS = (None, 0.75)
SPARE = "room to spare"
"""The load that has buffers for more choices than there are, as with `kernels.capacity`."""


def loads(tokens: int, num_experts: int) -> dict[str, Tensor]:
    """Return choices [N, K] by name."""
    generator = torch.Generator().manual_seed(3)

    def some(few: int) -> Tensor:
        return torch.rand(tokens, few, generator=generator).argsort(1)[:, :2]

    away = torch.where(torch.rand(tokens, 2, generator=generator) < 0.4, ELSEWHERE, some(num_experts))
    return {
        "even": some(num_experts),
        "empty experts": some(num_experts // 2) * 2,
        "all on one": torch.full((tokens, 1), num_experts - 1),
        "some elsewhere": away,
        SPARE: away,
        "all elsewhere": torch.full((tokens, 2), ELSEWHERE),
    }


def backends(given: Given) -> dict[ExpertBackend, tuple[torch.dtype, ...]]:
    """Return the back ends that run on the device, and the dtypes that are compared."""
    bf16, fp32 = torch.bfloat16, torch.float32
    if not given.cuda:
        return {"blocks": (fp32,), "batched": (fp32,), "grouped": (fp32,), "triton": (fp32,)}
    here: dict[ExpertBackend, tuple[torch.dtype, ...]] = {"batched": (fp32, bf16), "grouped": (bf16,)}
    here["triton"] = (bf16,)
    if transformer_engine() is None:
        here["transformer_engine"] = (bf16,)
    return here


def experts(given: Given) -> Iterator[Row]:
    """Yield the errors of every back end."""
    for name, dtypes in backends(given).items():
        for dtype in dtypes:
            yield from parity(given, name, dtype)
    if given.cuda and (reason := transformer_engine()):
        yield not_run("transformer_engine", reason)
    elif not given.cuda:
        yield not_run("transformer_engine", "it needs a CUDA device")


def parity(given: Given, backend: ExpertBackend, dtype: torch.dtype, names: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the errors of a back end under these loads (none: all)."""
    tokens, sizes = given.pick((700, (8, 512, 256)), (37, (6, 16, 24)))
    for load, choice_NK in loads(tokens, sizes[0]).items():
        if names and load not in names:
            continue
        for limit in LIMITS:
            where = f"{backend} {str(dtype).removeprefix('torch.')}, {load}, limit {limit}"
            yield from guarded(where, partial(_compare, given, backend, dtype, where, choice_NK, sizes, limit))


def _compare(
    given: Given,
    backend: ExpertBackend,
    dtype: torch.dtype,
    where: str,
    choice_NK: Tensor,
    sizes: tuple[int, int, int],
    limit: float | None,
) -> Iterator[Row]:
    num_experts, D, I = sizes
    generator = torch.Generator().manual_seed(5)
    layer = Experts(num_experts, D, I)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=D**-0.5, generator=generator)
    layer, layer.backend, layer.limit = layer.to(given.device, dtype), make_backend(backend), limit
    x, grad = (torch.randn(len(choice_NK), D, generator=generator).to(given.device, dtype) for _ in range(2))
    weights = (torch.rand(choice_NK.shape, generator=generator) + 0.1).to(given.device)
    inputs = [x.requires_grad_(), weights.requires_grad_(), *layer.parameters()]
    with unwritten_rows_are_nan():
        here = dispatched(x, choice_NK.to(given.device), weights)
        if SPARE in where:
            here = here._replace(num_here=here.num_here + len(choice_NK))
        y, stats = layer(here, with_stats=True)
        got = [y, *torch.autograd.grad(y, inputs, grad)]
    plain = exact(inputs)
    want_y, want_stats = reference.experts(plain, choice_NK, limit, dtype)
    want = [want_y, *torch.autograd.grad(want_y, plain, grad.cpu().double())]
    yield compared(f"{where}: y, dx, dw, dW", got, want, BOUNDS[dtype])
    worst, bound = 0.0, BOUNDS[dtype]
    for name, values in stats._asdict().items():
        worst = max(worst, error(values, want_stats[name]))
    yield judged(f"{where}: statistics", worst, bound)
