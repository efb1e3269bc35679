"""The matrix product of the CPU kernels: a · bᵀ, for operands of any strides.

PyTorch's fp32 `mm` on x86 goes to MKL, which leaves wide vector units of AMD processors unused; oneDNN, which is in the same
wheel and already serves bf16, uses them on every processor. Both are plain fp32 with fp32 sums.

Shapes: M, N rows of the operands, K their common width.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def matmul_nt(a_MK: Float[Tensor, "M K"], b_NK: Float[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """a · bᵀ, outside autograd. Pass transposed views for the other three forms."""
    if a_MK.dtype is torch.float32 and a_MK.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")
    return torch.mm(a_MK, b_NK.mT)
