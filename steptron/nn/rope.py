"""Rotary position embedding (RoPE): cos/sin tables, made once per step, and the rotation of q and k in every layer.

The rotation is half-split: of the first 2R channels of a head, channels c and c + R form a plane, which is turned by
position · frequency[c]. Channels after 2R are not changed (partial rotary). Tables and rotation are fp32; the result
has the input's dtype.

Shapes: N tokens, R rotated planes, H heads, A head_dim.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steptron.config.schema import RopeScalingConfig


def rope_frequencies(
    head_dim: int, rotary_share: float, theta: float, scaling: RopeScalingConfig | None
) -> Float[Tensor, "R"]:
    """Return radians per position, fp32: theta^(−c/R) for plane c, where R = head_dim · rotary_share / 2.

    `scaling` follows Llama 3.1. A plane makes turns = original_max_positions · frequency / 2π over the original
    context. Planes with fewer turns than low_freq_factor are slowed down by `factor`, and those with more than
    high_freq_factor are kept. Between them, the two are interpolated linearly in turns.
    """
    planes = int(head_dim * rotary_share) // 2
    # fp64 until the end: at 10⁵ positions the last fp32 bits of a power amount to a visible angle.
    frequencies = torch.pow(theta, -torch.arange(planes, dtype=torch.float64) / planes)
    if scaling is not None:
        turns = scaling.original_max_positions * frequencies / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        frequencies = frequencies * (kept + (1.0 - kept) / scaling.factor)
    return frequencies.float()


def rope_tables(
    positions_N: Int[Tensor, "N"], frequencies_R: Float[Tensor, "R"]
) -> tuple[Float[Tensor, "N R"], Float[Tensor, "N R"]]:
    """Return cos and sin of position · frequency, fp32, on the positions' device."""
    angles_NR = torch.outer(positions_N.float(), frequencies_R.to(positions_N.device))
    return angles_NR.cos(), angles_NR.sin()


def _rotate(x_NHA: Tensor, cos_NR: Tensor, sin_NR: Tensor, sign: int) -> Tensor:
    planes = cos_NR.shape[-1]
    cos, sin = cos_NR.unsqueeze(1), sin_NR.unsqueeze(1)
    x = x_NHA.to(torch.promote_types(x_NHA.dtype, cos.dtype))
    first, second = x[..., :planes], x[..., planes : 2 * planes]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=y[..., :planes]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=y[..., planes : 2 * planes]).addcmul_(first, sin, value=sign)
    y[..., 2 * planes :] = x[..., 2 * planes :]
    return y.to(x_NHA.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NHA: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
        ctx.save_for_backward(cos_NR, sin_NR)
        return _rotate(x_NHA, cos_NR, sin_NR, 1)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        # The inverse of a rotation is the rotation in the opposite direction.
        cos_NR, sin_NR = ctx.saved_tensors
        return _rotate(grads[0], cos_NR, sin_NR, -1), None, None


def apply_rope(
    x_NHA: Float[Tensor, "N H A"], cos_NR: Float[Tensor, "N R"], sin_NR: Float[Tensor, "N R"]
) -> Float[Tensor, "N H A"]:
    """Rotate the first 2R channels of every head by the angles of its token."""
    if torch.compiler.is_compiling():  # the compiler fuses and differentiates the formula itself
        x = x_NHA.to(torch.promote_types(x_NHA.dtype, cos_NR.dtype))
        cos, sin, planes = cos_NR.unsqueeze(1), sin_NR.unsqueeze(1), cos_NR.shape[-1]
        first, second, rest = x[..., :planes], x[..., planes : 2 * planes], x[..., 2 * planes :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x_NHA.dtype)
    return _Rope.apply(x_NHA, cos_NR, sin_NR)  # pyright: ignore[reportReturnType]
