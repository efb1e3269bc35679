"""The reference that every path is compared with: one token at a time, one expert at a time, plain autograd."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


def naive_experts(
    x_ND: Tensor,
    experts_NK: Tensor,
    weights_NK: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    limit: float | None,
) -> Tensor:
    """Σ_k weight · down(min(silu(gate), L) · clamp(up)) for each token by itself."""
    outputs = []
    for x_D, experts_K, weights_K in zip(x_ND, experts_NK.tolist(), weights_NK, strict=True):
        y_D = torch.zeros_like(x_D)
        for expert, weight in zip(experts_K, weights_K, strict=True):
            gate, up = F.silu(w_gate[expert] @ x_D), w_up[expert] @ x_D
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            y_D = y_D + weight * (w_down[expert] @ (gate * up))
        outputs.append(y_D)
    return torch.stack(outputs)


@pytest.fixture
def reference() -> Callable[..., Tensor]:
    return naive_experts
