"""The matrix product of the CPU kernels: a · bᵀ.

PyTorch's fp32 `mm` on x86 goes to MKL, which leaves half the vector width of AMD processors unused; oneDNN, which is in the
same wheel and already serves bf16, uses all of it on every processor. Both are plain fp32 with fp32 sums.

Shapes: M, N rows of the operands, K their common width.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def _dense(x: Tensor) -> Tensor:
    """Rows or columns without gaps: with gaps, oneDNN falls back to a scalar loop, a thousand times slower."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def matmul_nt(a_MK: Float[Tensor, "M K"], b_NK: Float[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """a · bᵀ, outside autograd. Pass transposed views for the other three forms."""
    if a_MK.dtype is torch.float32 and a_MK.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(_dense(a_MK), _dense(b_NK), None, "none", [], "")
    return torch.mm(a_MK, b_NK.mT)
