"""SwiGLU feed-forward, with optional activation limits: down(min(silu(gate(x)), L) · clamp(up(x), −L, L)).

The limit keeps a few experts of the last layers from blowing up. It sits after SiLU, on the upper side only, and on both sides of
`up`. The product is one autograd function that keeps `gate` and `up` for its backward and recomputes the rest.

Shapes: D hidden, I inner width, * any leading dims.
"""

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
        # Masks are factors 0 and 1 in the tensors' own dtype: masked fills are several times slower on CPU.
        clipped = activated.clamp(max=limit)
        grad_activated = up.clamp(-limit, limit).mul_(grad).mul_(activated.eq_(clipped))
        grad_up = clipped.mul_(grad).mul_(up.abs().le_(limit))
        return torch.ops.aten.silu_backward(grad_activated, gate), grad_up, None


def clipped_swiglu(
    gate: Float[Tensor, "*rows I"], up: Float[Tensor, "*rows I"], limit: float | None
) -> Float[Tensor, "*rows I"]:
    """`silu(gate).clamp(max=limit) · up.clamp(−limit, limit)`; without limits when `limit` is None."""
    if torch.compiler.is_compiling():  # the compiler fuses and differentiates the formula itself
        act = F.silu(gate)
        return act * up if limit is None else act.clamp(max=limit) * up.clamp(-limit, limit)
    return _ClippedSwiglu.apply(gate, up, limit)  # pyright: ignore[reportReturnType]


class GatedMLP(nn.Module):
    """gate_proj, up_proj [I, D] and down_proj [D, I]; `limit` is set by the stage."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, ffn_size)
        self.up_proj = Linear(hidden_size, ffn_size)
        self.down_proj = Linear(ffn_size, hidden_size)
        self.limit: float | None = None
        self.keep_product: Keep = keep
        """Makes the product before down_proj; replaced from outside where it is to be computed again in backward."""
        self.with_inner = False
        """Whether the next forward pass shall leave gate and up to be looked at."""
        self._inner: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.with_inner:
            self._inner = gate.detach(), up.detach()
        return self.down_proj(self.keep_product(clipped_swiglu, gate, up, self.limit))

    def take_inner(self) -> tuple[Tensor, Tensor]:
        """(gate, up) [..., I] of the last forward pass, which was asked for them; before they are clipped."""
        inner, self._inner = self._inner, None
        assert inner is not None, "the MLP was not asked for its gate and up"
        return inner
