"""Parity of the other formulas: loss, norm, RoPE, SwiGLU, router with its ties, Muon and AdamW.

Legend: N tokens, D hidden, V vocabulary, E experts, K choices a token, H heads, A head_dim, R rows, C columns.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from gpu_parts import reference
from gpu_parts.attention import dtypes
from gpu_parts.reference import exact, with_gradients
from gpu_parts.rows import BOUNDS, Given, Row, compared, error, guarded, judged
from steptron.moe.router import route, select
from steptron.nn.loss import chunked_loss, cross_entropy
from steptron.nn.mlp import clipped_swiglu
from steptron.nn.norm import rms_norm
from steptron.nn.rope import apply_rope, rope_frequencies, rope_tables
from steptron.optim.adamw import AdamW
from steptron.optim.muon import Muon, orthogonalise

HALF = 1e-2
"""The largest error of an orthogonalised matrix whose products are fp16. On a CPU, with products rounded to fp16, it is
0.0011."""
TABLES = 1e-6
"""The largest error of a cosine or sine of an fp32 angle."""


def randoms(given: Given, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Return random tensors on the device, leaves with gradients."""
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(s, generator=generator).to(given.device, dtype).requires_grad_() for s in shapes]


def formulas(given: Given) -> Iterator[Row]:
    """Yield the errors of loss, norm, RoPE, SwiGLU and router, result and gradients."""
    for dtype in dtypes(given):
        for name, check in (("loss", _loss), ("norm", _norm), ("RoPE", _rope), ("SwiGLU", _swiglu), ("router", _route)):
            yield from guarded(f"{name}, {dtype}", partial(check, given, dtype))
    yield from guarded("RoPE tables", partial(_tables, given))
    yield from guarded("router ties", partial(_ties, given))


def _loss(given: Given, dtype: torch.dtype) -> Iterator[Row]:
    N, D, V = given.pick((1000, 512, 8192), (150, 24, 97))
    x, weight = randoms(given, dtype, (N, D), (V, D))
    weight = (weight.detach() * D**-0.5).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    targets, weights = torch.randint(V, (N,), generator=generator), torch.rand(N, generator=generator)
    weights[:5] = 0.0
    want = with_gradients(
        partial(reference.loss, targets_N=targets, weights_N=weights.double()), exact([x, weight]), ONE
    )
    given_targets = {"targets_N": targets.to(given.device), "weights_N": weights.to(given.device)}
    constants = torch.zeros(0, N, device=given.device)
    for chunk in (64, N):
        total, _ = chunked_loss(
            x, weight, None, **given_targets, constants_KN=constants, rule=cross_entropy, chunk=chunk
        )
        grads = torch.autograd.grad(total, [x, weight])
        bounds = (1e-3 if dtype is torch.bfloat16 else 1e-6, BOUNDS[dtype], BOUNDS[dtype])
        yield compared(f"loss, chunks of {chunk}, {dtype}: loss, dx, dW", [total, *grads], want, bounds)


ONE = torch.ones((), dtype=torch.float64)


def _norm(given: Given, dtype: torch.dtype) -> Iterator[Row]:
    for shape in given.pick(((500, 4096), (100, 64, 128)), ((50, 48), (20, 6, 16))):
        x, weight, grad = randoms(given, dtype, shape, (shape[-1],), shape)
        ours, plain = partial(rms_norm, eps=1e-5), partial(reference.norm, eps=1e-5)
        got, want = with_gradients(ours, [x, weight], grad), with_gradients(plain, exact([x, weight]), grad.cpu())
        yield compared(f"norm of {shape[-1]}, {dtype}: y, dx, dw", got, want, BOUNDS[dtype])


def _rope(given: Given, dtype: torch.dtype) -> Iterator[Row]:
    width, tokens = given.pick((128, 4096), (16, 300))
    for share in (1.0, 0.5):
        x, grad = randoms(given, dtype, (tokens, 8, width), (tokens, 8, width))
        cos, sin = rope_tables(torch.arange(tokens, device=given.device), rope_frequencies(width, share, 1e4, None))
        planes = int(width * share) // 2
        frequencies = 1e4 ** (-torch.arange(planes, dtype=torch.float64) / planes)
        angles = torch.outer(torch.arange(tokens).double(), frequencies)
        got = with_gradients(lambda x, cos=cos, sin=sin: apply_rope(x, cos, sin), [x], grad)
        want = with_gradients(lambda x, angles=angles: reference.rope(x, angles), exact([x]), grad.cpu())
        # An angle is rounded to fp32, that of the last token to 2⁻¹³.
        bound = BOUNDS[dtype] if dtype is torch.bfloat16 else max(BOUNDS[dtype], tokens * 2.0**-23)
        yield compared(f"RoPE over {share:g} of a head, {dtype}: y, dx", got, want, bound)


def _tables(given: Given) -> Iterator[Row]:
    """Yield the error of cosines and sines of large angles: fast ones of a GPU are wrong there."""
    positions, frequencies = torch.tensor([0, 1, 4095, 131_071, 262_143]), rope_frequencies(128, 1.0, 1e4, None)
    got = rope_tables(positions.to(given.device), frequencies)
    angles = torch.outer(positions.float(), frequencies).double()
    worst = max(
        float((a.cpu().double() - b).abs().max()) for a, b in zip(got, (angles.cos(), angles.sin()), strict=True)
    )
    yield judged("RoPE tables up to position 262,143", worst, TABLES)


def _swiglu(given: Given, dtype: torch.dtype) -> Iterator[Row]:
    shape = given.pick((500, 1280), (50, 24))
    for limit in (None, 0.75):
        gate, up, grad = randoms(given, dtype, shape, shape, shape)
        got = with_gradients(partial(clipped_swiglu, limit=limit), [gate, up], grad)
        want = with_gradients(partial(reference.swiglu, limit=limit), exact([gate, up]), grad.cpu())
        yield compared(f"SwiGLU of the shared expert, limit {limit}, {dtype}: h, dgate, dup", got, want, BOUNDS[dtype])


def _route(given: Given, dtype: torch.dtype) -> Iterator[Row]:
    """Yield the error of the weights of the choices that were made: the router's product is fp32, not TF32 or bf16."""
    N, D, E, K = given.pick((1000, 4096, 288, 8), (60, 48, 12, 3))
    x, weight = randoms(given, dtype, (N, D), (E, D))
    weight = (weight.detach() * D**-0.5).requires_grad_()
    (grad,) = randoms(given, torch.float32, (N, K))
    bias = torch.linspace(-0.1, 0.1, E, device=given.device)
    found = route(x, weight, bias, K, 3.0)
    got = [found.weights_NK, *torch.autograd.grad(found.weights_NK, [x, weight], grad)]
    chosen = found.experts_NK.cpu()
    want = with_gradients(partial(reference.route, experts_NK=chosen, scaling=3.0), exact([x, weight]), grad.cpu())
    yield compared(
        f"router, {dtype}: weights, dx, dW", got, want, (BOUNDS[torch.float32], BOUNDS[dtype], BOUNDS[dtype])
    )
    scores = torch.sigmoid(x.detach().cpu().double() @ weight.detach().cpu().double().T) + bias.cpu().double()
    lost = scores.topk(K).values[:, -1] - scores.gather(1, chosen).amin(1)
    yield judged(f"router, {dtype}: score lost by a choice", float(lost.max()), 1e-5)


def _ties(given: Given) -> Iterator[Row]:
    """Yield the number of tokens whose choices among equal scores are not those of a sort by (score, index)."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-2, 3, (300, 288), generator=generator) * 0.25
    scores[::2] *= -1.0  # zeros become −0, which equals 0
    scores[0], scores[1, :100] = 0.5, -torch.inf
    got = select(scores.to(given.device), 8).tolist()
    wrong = sum(row != reference.best(own, 8) for row, own in zip(got, scores.tolist(), strict=True))
    yield judged("router ties: tokens with another order", float(wrong), 0.0)


def optimizers(given: Given) -> Iterator[Row]:
    """Yield the errors of orthogonalisation (fp16 products on CUDA), and of three steps of Muon and AdamW."""
    yield from guarded("orthogonalisation", partial(_orthogonalise, given))
    yield from guarded("Muon", partial(_muon, given))
    yield from guarded("AdamW", partial(_adamw, given))


def conditioned(generator: torch.Generator, *shape: int) -> Tensor:
    """Return matrices [M, R, C] whose singular values fall from 1 to 0.1."""
    u, _, v = torch.linalg.svd(torch.randn(*shape, generator=generator, dtype=torch.float64), full_matrices=False)
    return ((u * torch.linspace(1, 0.1, u.shape[-1], dtype=torch.float64)) @ v).float()


def _orthogonalise(given: Given) -> Iterator[Row]:
    generator, bound = torch.Generator().manual_seed(0), given.pick(HALF, BOUNDS[torch.float32])
    for shape in given.pick(((2, 256, 640), (2, 640, 256), (1, 512, 512)), ((2, 12, 20), (2, 20, 12), (1, 16, 16))):
        for scale in (1e-6, 1.0, 1e4):
            x = conditioned(generator, *shape) * scale
            want = torch.stack([reference.orthogonal(matrix) for matrix in x.double()])
            yield compared(f"orthogonal {shape}, scale {scale:g}", [orthogonalise(x.to(given.device))], [want], bound)


def _muon(given: Given) -> Iterator[Row]:
    generator, shape = torch.Generator().manual_seed(1), given.pick((3, 192, 320), (3, 10, 16))
    start, gradients = conditioned(generator, *shape), [conditioned(generator, *shape) for _ in range(3)]
    p = nn.Parameter(start.clone().to(given.device))
    optimizer = Muon.of({"matrices": p}, 0.1, 0.95)
    for gradient in gradients:
        p.grad = gradient.to(given.device)
        optimizer.step(0.02)
    want = reference.muon(start.double(), [g.double() for g in gradients], 0.02, 0.1, 0.95)
    moved, wanted = p.detach().cpu() - start, want - start.double()
    yield judged("Muon, three steps: change of the weights", error(moved, wanted), given.pick(HALF, 1e-4))


def _adamw(given: Given) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(2)
    start, *gradients = torch.randn(4, 33, 65, generator=generator).unbind()
    p = nn.Parameter(start.clone().to(given.device))
    optimizer = AdamW.of({"p": p}, 0.1, 0.9, 0.95, 1e-8)
    for gradient in gradients:
        p.grad = gradient.to(given.device)
        optimizer.step(0.02)
    want = reference.adamw(start.double(), [g.double() for g in gradients], 0.02, 0.1, (0.9, 0.95), 1e-8)
    moved, wanted = p.detach().cpu() - start, want - start.double()
    yield judged("AdamW, three steps: change of the weights", error(moved, wanted), 1e-4)
