"""Formulas of the network once more, as plainly as they can be written, in float64 on the CPU with plain autograd.

Nothing here calls the package. Legend: N tokens, M keys, H query heads, K KV heads (of experts: choices a token), A
head_dim, D hidden, E experts, I expert FFN, V vocabulary, R rows, C columns.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from naive_step import orthogonal  # pyright: ignore[reportMissingImports]  (tests/naive_step.py)
from torch import Tensor

__all__ = ["orthogonal"]


def exact(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in float64 on the CPU, as leaves with gradients where they are not integers."""
    return [t.detach().cpu().double().requires_grad_() for t in tensors]


def with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Return a function's result and the gradients of its inputs, given the gradient of the result."""
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out))]


def attention(
    q_NHA: Tensor, k_MKA: Tensor, v_MKA: Tensor, places: Sequence[int], borders: Sequence[int], window: int | None
) -> Tensor:
    """Attend causally within documents, which hold the keys from one border to the next.

    `places`: the key that belongs to the same token as each query. A query sees the last `window` keys up to it.
    """
    group, scale = q_NHA.shape[1] // k_MKA.shape[1], q_NHA.shape[-1] ** -0.5
    place_N, out = torch.tensor(places), []
    for start, stop in pairwise(borders):
        mine = (place_N >= start) & (place_N < stop)
        k, v = (t[start:stop].repeat_interleave(group, 1) for t in (k_MKA, v_MKA))
        distance = place_N[mine, None] - torch.arange(start, stop)
        hidden = (distance < 0) | (distance >= (window or math.inf))
        scores = (torch.einsum("nha,mha->hnm", q_NHA[mine], k) * scale).masked_fill(hidden, -math.inf)
        out.append(torch.einsum("hnm,mha->nha", scores.softmax(-1), v))
    return torch.cat(out)


def swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """Return min(silu(gate), L) · clamp(up, −L, L)."""
    gate = F.silu(gate)
    return gate * up if limit is None else gate.clamp(max=limit) * up.clamp(-limit, limit)


def experts(
    inputs: Sequence[Tensor], choice_NK: Tensor, limit: float | None, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return Σ_k weight · expert(x) [N, D], and the statistics of each expert [E] by name. Choices below 0 add 0.

    `inputs`: x [N, D], weights [N, K], gate [E, I, D], up [E, I, D], down [E, D, I]. `gate` and `up` are
    rounded to `dtype`, in which they are kept: which of them are beyond the limit is part of the result. Gradients pass
    the rounding unchanged.
    """
    x_ND, weights_NK, gate_EID, up_EID, down_EDI = inputs
    y_ND, found = torch.zeros_like(x_ND), []
    for expert, (gate_ID, up_ID, down_DI) in enumerate(zip(gate_EID, up_EID, down_EDI, strict=True)):
        tokens, choices = torch.where(choice_NK == expert)
        gate, up = (x_ND[tokens] @ w_ID.T for w_ID in (gate_ID, up_ID))
        gate, up = (t + (t.detach().to(dtype).double() - t.detach()) for t in (gate, up))
        h = swiglu(gate, up, limit)
        out = h @ down_DI.T
        y_ND = y_ND.index_add(0, tokens, weights_NK[tokens, choices, None] * out)
        gate, up, h, out = (t.detach() for t in (gate, up, h, out))
        free, some = F.silu(gate), math.ceil(gate.shape[1] / 8)
        over = 0.0 if limit is None else float((free > limit).sum() + (up.abs() > limit).sum())
        g, u = gate[:, :some], up[:, :some]
        found.append(
            {
                "rows": float(len(tokens)),
                "h_square": h.square().sum(),
                "gate_up": (g * u).sum(),
                "gate_square": g.square().sum(),
                "up_square": u.square().sum(),
                "out_norm": out.norm(dim=1).sum(),
                "clipped": over,
                "peak_gate": free.amax().clamp(min=0.0) if len(tokens) else 0.0,
                "peak_up": up.abs().amax() if len(tokens) else 0.0,
            }
        )
    return y_ND, {n: torch.tensor([float(f[n]) for f in found], dtype=torch.float64) for n in found[0]}


def loss(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """Return −Σ weight · log softmax(x · weightᵀ)[target]."""
    log_p_NV = torch.log_softmax(x_ND @ weight_VD.T, dim=1)
    return -(weights_N * log_p_NV.gather(1, targets_N[:, None])[:, 0]).sum()


def norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return x ÷ √(mean x² + eps) · (1 + weight) over the last dim."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * (1 + weight_D)


def rope(x_NHA: Tensor, angles_NR: Tensor) -> Tensor:
    """Turn channels c and c + R of each head by the angle of plane c, as complex numbers; keep those after 2R."""
    planes = angles_NR.shape[1]
    turned = torch.complex(x_NHA[..., :planes], x_NHA[..., planes : 2 * planes])
    turned = turned * torch.polar(torch.ones_like(angles_NR), angles_NR)[:, None]
    return torch.cat([turned.real, turned.imag, x_NHA[..., 2 * planes :]], dim=-1)


def route(x_ND: Tensor, weight_ED: Tensor, experts_NK: Tensor, scaling: float) -> Tensor:
    """Return the weights of these choices [N, K]: their sigmoids, with `scaling` as the sum."""
    chosen_NK = torch.sigmoid(x_ND @ weight_ED.T).gather(1, experts_NK)
    return scaling * chosen_NK / chosen_NK.sum(1, keepdim=True)


def best(scores_E: Sequence[float], top_k: int) -> list[int]:
    """Return the indices of the `top_k` highest scores, best first; of equal ones the lower index first."""
    return sorted(range(len(scores_E)), key=lambda e: (-scores_E[e], e))[:top_k]


def adamw(
    p: Tensor, gradients: Sequence[Tensor], lr: float, decay: float, betas: tuple[float, float], eps: float
) -> Tensor:
    """Return a parameter after a step with each gradient (arXiv 1711.05101)."""
    first = second = torch.zeros_like(p)
    for step, g in enumerate(gradients, start=1):
        first, second = betas[0] * first + (1 - betas[0]) * g, betas[1] * second + (1 - betas[1]) * g * g
        change = first / (1 - betas[0] ** step) / ((second / (1 - betas[1] ** step)).sqrt() + eps)
        p = p - lr * decay * p - lr * change
    return p


def muon(p_MRC: Tensor, gradients: Sequence[Tensor], lr: float, decay: float, beta: float) -> Tensor:
    """Return matrices after a step with each gradient: Nesterov momentum, made orthogonal by Polar Express."""
    momentum, scale = torch.zeros_like(p_MRC), 0.2 * math.sqrt(max(p_MRC.shape[-2:]))
    for g in gradients:
        momentum = beta * momentum + g
        update = torch.stack([orthogonal(x) for x in g + beta * momentum])
        p_MRC = p_MRC - lr * decay * p_MRC - lr * scale * update
    return p_MRC
