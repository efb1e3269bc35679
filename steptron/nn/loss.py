"""Cross-entropy of the output matrix, summed over targets, without ever holding the logits of all tokens.

    x_ND ─ chunks of rows ─► logits ─► log-softmax ─► loss
                                          └─► softmax − one-hot ─► gradients of x and of the weight, at once

The gradient of a sum of losses does not depend on what comes after it, up to one factor; so both gradients are made while a chunk's logits
exist, and backward only multiplies. That is three matrix products instead of the four of recomputing, and one chunk of memory.

Shapes: N tokens, D hidden, V vocabulary, C tokens of a chunk.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steptron.nn.matmul import matmul_nt

IGNORED = -100
"""Target of a token that has none. (Any negative target counts as masked.)"""


def _losses(x_CD: Tensor, wide_weight_VD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Loss by token [C], 0 where masked, and probabilities [C, V]."""
    logits_CV = matmul_nt(x_CD.to(wide_weight_VD.dtype), wide_weight_VD)
    picked_C = logits_CV.gather(1, targets_C.clamp(min=0).unsqueeze(1)).squeeze(1)
    highest_C = logits_CV.amax(dim=1)
    probabilities_CV = torch.softmax(logits_CV, dim=1)
    # The highest probability is 1 / Σ exp(logit − highest), which is all that log-sum-exp lacks.
    log_sum_exp_C = highest_C - probabilities_CV.amax(dim=1).log_()
    return (log_sum_exp_C - picked_C).masked_fill_(targets_C < 0, 0.0), probabilities_CV


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        wide_weight_VD = weight_VD.to(torch.promote_types(weight_VD.dtype, torch.float32))
        losses_N = torch.empty(x_ND.shape[0], dtype=wide_weight_VD.dtype, device=x_ND.device)
        grad_x_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        grad_w_VD = torch.zeros_like(wide_weight_VD)
        for start in range(0, x_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            targets_C = targets_N[rows]
            losses_N[rows], grad_CV = _losses(x_ND[rows], wide_weight_VD, targets_C)
            picked_C1 = targets_C.clamp(min=0).unsqueeze(1)
            grad_CV.scatter_add_(1, picked_C1, torch.full_like(picked_C1, -1, dtype=grad_CV.dtype))
            grad_CV = grad_CV.to(x_ND.dtype)
            # A masked token's row is zeroed in the two thin products, which is cheaper than in its wide gradient.
            masked_C1 = (targets_C < 0).unsqueeze(1)
            grad_x_ND[rows] = matmul_nt(grad_CV, weight_VD.mT).masked_fill_(masked_C1, 0.0)
            grad_w_VD += matmul_nt(grad_CV.mT, x_ND[rows].masked_fill(masked_C1, 0.0).mT)
        ctx.save_for_backward(grad_x_ND, grad_w_VD.to(weight_VD.dtype))
        return losses_N.sum()

    @staticmethod
    def backward(ctx, *grads: Tensor):
        grad_x_ND, grad_w_VD = ctx.saved_tensors
        factor = grads[0]
        return grad_x_ND * factor.to(grad_x_ND.dtype), grad_w_VD * factor.to(grad_w_VD.dtype), None, None


def chunked_cross_entropy(
    x_ND: Float[Tensor, "N D"], weight_VD: Float[Tensor, "V D"], targets_N: Int[Tensor, "N"], chunk: int
) -> Float[Tensor, ""]:
    """Sum of −log softmax(x · weightᵀ)[target] over the targets ≥ 0, in fp32; `chunk` rows of logits exist at a time."""
    if torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad):
        return _ChunkedCrossEntropy.apply(x_ND, weight_VD, targets_N, chunk)  # pyright: ignore[reportReturnType]
    wide_weight_VD = weight_VD.to(torch.promote_types(weight_VD.dtype, torch.float32))
    parts = zip(x_ND.split(chunk), targets_N.split(chunk), strict=True)
    return torch.cat([_losses(x_CD, wide_weight_VD, targets_C)[0] for x_CD, targets_C in parts]).sum()
