"""Zero-centred RMSNorm: y = x · rsqrt(mean(x²) + eps) · (1 + w), where w starts at 0.

All arithmetic is in fp32 (fp64 for fp64 inputs); only the result is rounded to the input's dtype. Forward and backward
are written by hand, because a chain of small autograd operations would read and write the activations several times as
often.

Shapes: D normalised channels (the last dim), * any leading dims.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steptron.nn.to_local import local

Norm = Callable[[Tensor, Tensor, float], Tensor]
"""Maps (x [*rows, D], weight [D], eps) to the normalised rows, in the dtype of x."""


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = x.to(wide)
        inverse = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (rows * inverse).mul_(weight.to(wide) + 1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, weight, inverse = ctx.saved_tensors
        width = x.shape[-1]
        rows, grad = x.to(inverse.dtype).reshape(-1, width), grads[0].to(inverse.dtype).reshape(-1, width)
        inverse, scale = inverse.reshape(-1, 1), weight.to(inverse.dtype) + 1.0
        product = grad * rows
        grad_weight = torch.mv(product.mT, inverse.squeeze(1)).to(weight.dtype)
        # dx = r·g·(1 + w) − x·r³·mean(x·g·(1 + w)), with r = rsqrt(mean(x²) + eps).
        mean = torch.mv(product, scale).div_(width).unsqueeze_(1)
        grad_x = torch.mul(grad, scale, out=product).mul_(inverse).addcmul_(rows, mean.mul_(inverse.pow(3)), value=-1)
        return grad_x.view(x.shape).to(x.dtype), grad_weight, None


def rms_norm(x: Float[Tensor, "*rows D"], weight: Float[Tensor, "D"], eps: float) -> Float[Tensor, "*rows D"]:
    """Return `x · rsqrt(mean(x²) + eps) · (1 + weight)` over the last dim, computed in fp32, in `x`'s dtype."""
    if torch.compiler.is_compiling():  # the compiler fuses and differentiates the formula itself
        rows = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + eps)
        return (rows * inverse * (weight.to(rows.dtype) + 1.0)).to(x.dtype)
    return _RMSNormFunction.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


class RMSNorm(nn.Module):
    """RMSNorm with its weight [size], which starts at 0."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps
        self.norm: Norm = rms_norm
        """The function that normalises; set from outside for the device."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., size] to the same shape and dtype."""
        return self.norm(x, local(self.weight), self.eps)
