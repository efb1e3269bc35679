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


def _chunk_loss(x_CD: Tensor, weight_VD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of losses of the unmasked targets, and log-probabilities [C, V] in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(x_CD.dtype, torch.float32)
    log_probs_CV = torch.log_softmax(matmul_nt(x_CD, weight_VD), dim=-1, dtype=wide)
    picked_C = log_probs_CV.gather(1, targets_C.clamp(min=0).unsqueeze(1)).squeeze(1)
    return picked_C.masked_fill(targets_C < 0, 0.0).sum().neg_(), log_probs_CV


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x_ND.device)
        grad_x_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        grad_w_VD = torch.zeros(weight_VD.shape, dtype=wide, device=x_ND.device)
        for start in range(0, x_ND.shape[0], chunk):
            targets_C = targets_N[start : start + chunk]
            masked_C1 = (targets_C < 0).unsqueeze(1)
            # A masked token's row is zeroed in the two thin products, which is cheaper than in its wide logits.
            x_CD = x_ND[start : start + chunk].masked_fill(masked_C1, 0.0)
            loss, log_probs_CV = _chunk_loss(x_CD, weight_VD, targets_C)
            total += loss
            grad_CV = log_probs_CV.exp_()
            rows_C = torch.arange(len(targets_C), device=x_ND.device)
            grad_CV[rows_C, targets_C.clamp(min=0)] -= 1.0
            grad_CV = grad_CV.to(x_ND.dtype)
            grad_x_ND[start : start + chunk] = matmul_nt(grad_CV, weight_VD.mT).masked_fill_(masked_C1, 0.0)
            grad_w_VD += matmul_nt(grad_CV.mT, x_CD.mT)
        ctx.save_for_backward(grad_x_ND, grad_w_VD.to(weight_VD.dtype))
        return total

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
    parts = zip(x_ND.split(chunk), targets_N.split(chunk), strict=True)
    return torch.stack([_chunk_loss(x_CD, weight_VD, targets_C)[0] for x_CD, targets_C in parts]).sum()
