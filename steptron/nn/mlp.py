"""SwiGLU feed-forward with optional activation limits: down(min(silu(gate(x)), L) · clamp(up(x), −L, L)).

The limit keeps a few experts of the last layers from growing without bound. It clips the result of SiLU from above
only, and `up` on both sides. The product is one autograd function, which keeps `gate` and `up` for backward and
recomputes the rest.

Shapes: D hidden, I inner width, * any leading dims.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from steptron.nn.linear import Linear
from steptron.nn.recompute import Keep, keep


class _ClippedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        if limit is None:
            return F.silu(gate).mul_(up)
        return F.silu(gate).clamp_(max=limit).mul_(up.clamp(-limit, limit))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        gate, up = ctx.saved_tensors
        grad, limit = grads[0], ctx.limit
        activated = F.silu(gate)
        if limit is None:
            return torch.ops.aten.silu_backward(grad * up, gate), activated.mul_(grad), None
        # Multiply with masks of 0 and 1 in the tensors' own dtype: masked fills are several times slower on a CPU.
        clipped = activated.clamp(max=limit)
        grad_activated = up.clamp(-limit, limit).mul_(grad).mul_(activated.eq_(clipped))
        grad_up = clipped.mul_(grad).mul_(up.abs().le_(limit))
        return torch.ops.aten.silu_backward(grad_activated, gate), grad_up, None


def clipped_swiglu(
    gate: Float[Tensor, "*rows I"], up: Float[Tensor, "*rows I"], limit: float | None
) -> Float[Tensor, "*rows I"]:
    """Return `silu(gate).clamp(max=limit) · up.clamp(−limit, limit)`; nothing is clipped if `limit` is None."""
    if torch.compiler.is_compiling():  # the compiler fuses and differentiates the formula itself
        act = F.silu(gate)
        return act * up if limit is None else act.clamp(max=limit) * up.clamp(-limit, limit)
    return _ClippedSwiglu.apply(gate, up, limit)  # pyright: ignore[reportReturnType]


class GatedMLP(nn.Module):
    """A gated MLP: gate_proj and up_proj [I, D], down_proj [D, I]. The stage sets `limit`."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, ffn_size)
        self.up_proj = Linear(hidden_size, ffn_size)
        self.down_proj = Linear(ffn_size, hidden_size)
        self.limit: float | None = None
        self.keep_product: Keep = keep
        """Calls the function that computes the input of down_proj; replaced from outside to recompute it in backward.
        """

    def forward(self, x: Tensor, between: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
        """Map x [..., D] to y [..., D].

        `between` is called in the middle, before down_proj, with gate and up [..., I] before clipping. What it starts
        runs while down_proj does.
        """
        h, gate, up = self.inner(x)
        if between is not None:
            between(gate, up)
        return self.down_proj(h)

    def inner(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the input of down_proj, gate and up, each [..., I]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.keep_product(clipped_swiglu, gate, up, self.limit), gate, up
