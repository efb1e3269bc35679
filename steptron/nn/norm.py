"""Zero-centred RMSNorm: y = x · rsqrt(mean(x²) + eps) · (1 + w), with w = 0 at the start.

The weight is a deviation from one, so that weight decay, where it is used, pulls the norm towards doing nothing. All arithmetic is
in fp32 (fp64 for fp64 inputs); only the result is rounded to the input's dtype. Forward and backward are written out, because
a chain of small autograd operations reads and writes the activations three times as often.

Shapes: D normalised channels (the last dim), * any leading dims.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


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
        grad_y = grads[0].to(inverse.dtype)
        normed = x.to(inverse.dtype) * inverse
        product = grad_y * normed
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        scale = weight.to(inverse.dtype) + 1.0
        # dx = inverse · (g − n · mean(g · n)) with g = dy · (1 + w) and n the normed row.
        mean = torch.mv(product.flatten(0, -2), scale).div_(x.shape[-1]).view_as(inverse)
        grad_x = torch.mul(grad_y, scale, out=product).addcmul_(normed, mean, value=-1.0).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None


def rms_norm(x: Float[Tensor, "*rows D"], weight: Float[Tensor, "D"], eps: float) -> Float[Tensor, "*rows D"]:
    """`x · rsqrt(mean(x²) + eps) · (1 + weight)` over the last dim, in fp32, returned in `x`'s dtype."""
    return _RMSNormFunction.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


class RMSNorm(nn.Module):
    """The norm with its weight [size], zero at the start."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] → [..., size], same dtype."""
        return rms_norm(x, self.weight, self.eps)
