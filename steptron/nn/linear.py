"""A bias-free `nn.Linear` that uses the products of matmul.py in fp32 on a CPU, forward and backward.

Elsewhere it is `nn.Linear`.

Shapes: N rows (any leading dims flattened), D inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steptron.nn.matmul import matmul_nt
from steptron.nn.to_local import local


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_OD: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_OD)
        return matmul_nt(x_ND, weight_OD)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x_ND, weight_OD = ctx.saved_tensors
        grad_x_ND = matmul_nt(grads[0], weight_OD.mT) if ctx.needs_input_grad[0] else None
        grad_w_OD = matmul_nt(grads[0].mT, x_ND.mT) if ctx.needs_input_grad[1] else None
        return grad_x_ND, grad_w_OD


def linear(x: Tensor, weight_OD: Tensor) -> Tensor:
    """Return x [..., D] · weightᵀ: [..., O]."""
    plain_fp32 = x.device.type == "cpu" and x.dtype is torch.float32 and weight_OD.dtype is torch.float32
    if not plain_fp32 or torch.compiler.is_compiling():
        return F.linear(x, weight_OD)
    y_NO: Tensor = _Linear.apply(x.flatten(0, -2), weight_OD)  # pyright: ignore[reportAssignmentType]
    return y_NO.unflatten(0, x.shape[:-1]) if x.dim() > 2 else y_NO


class Linear(nn.Linear):
    """A linear layer without bias; its weight is [O, D]."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, num_outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., D] to [..., O]."""
        return linear(input, local(self.weight))
