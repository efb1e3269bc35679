"""Cross-entropy of the output matrix, summed over targets, without ever holding the logits of all tokens.

    x_ND ─ chunks of rows ─► logits ─► loss
                                └─► softmax − one-hot ─► gradients of x and of the weight, at once

The gradient of a sum of losses does not depend on what comes after it, up to one factor. So both gradients are made while a chunk's
logits exist, and backward only multiplies: three matrix products instead of the four of recomputing, and one chunk of memory.
Logits, softmax, loss and the sum of the weight's gradient are fp32 for bf16 operands too.

Shapes: N tokens, D hidden, V vocabulary, C tokens of a chunk.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steptron.nn.matmul import matmul_nt

IGNORED = -100
"""Target of a token that has none. Any negative target counts as masked."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _logits_operand(weight_VD: Tensor) -> Tensor:
    """The weight as the logits' product wants it: CUDA multiplies halves into fp32, elsewhere the operands must be fp32."""
    return weight_VD if weight_VD.is_cuda else weight_VD.to(_wide(weight_VD.dtype))


def _logits(x_CD: Tensor, operand_VD: Tensor) -> Tensor:
    wide = _wide(x_CD.dtype)
    if operand_VD.dtype is not wide:
        return torch.mm(x_CD, operand_VD.mT, out_dtype=wide)
    return matmul_nt(x_CD.to(wide), operand_VD)


def _losses(x_CD: Tensor, operand_VD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Loss by token [C], 0 where masked, and probabilities [C, V]."""
    logits_CV = _logits(x_CD, operand_VD)
    picked_C = logits_CV.gather(1, targets_C.clamp(min=0).unsqueeze(1)).squeeze(1)
    highest_C = logits_CV.amax(dim=1)
    probabilities_CV = torch.softmax(logits_CV, dim=1)
    # The highest probability is 1 / Σ exp(logit − highest), which is all that log-sum-exp lacks.
    log_sum_exp_C = highest_C - probabilities_CV.amax(dim=1).log_()
    return (log_sum_exp_C - picked_C).masked_fill_(targets_C < 0, 0.0), probabilities_CV


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        wide, narrow = _wide(weight_VD.dtype), weight_VD.dtype
        operand_VD = _logits_operand(weight_VD)
        losses_N = torch.empty(x_ND.shape[0], dtype=wide, device=x_ND.device)
        grad_x_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        grad_w_VD = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, x_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            x_CD, targets_C = x_ND[rows], targets_N[rows]
            losses_N[rows], grad_CV = _losses(x_CD, operand_VD, targets_C)
            grad_CV[torch.arange(len(targets_C), device=x_ND.device), targets_C.clamp(min=0)] -= 1.0
            grad_CV = grad_CV.to(narrow)
            # A masked token's row is zeroed in the thin operands, which is cheaper than in its wide gradient.
            masked_C1 = (targets_C < 0).unsqueeze(1)
            grad_x_ND[rows] = matmul_nt(grad_CV, weight_VD.mT).masked_fill_(masked_C1, 0.0)
            if grad_w_VD is not None:
                grad_w_VD += matmul_nt(grad_CV.mT, x_CD.masked_fill(masked_C1, 0.0).mT)
        ctx.save_for_backward(grad_x_ND, None if grad_w_VD is None else grad_w_VD.to(narrow))
        return losses_N.sum()

    @staticmethod
    def backward(ctx, *grads: Tensor):
        # In fp32: 1 / targets rounded to bf16 would scale every gradient of the step by up to 1.002.
        scaled = (None if g is None else (g.to(grads[0].dtype) * grads[0]).to(g.dtype) for g in ctx.saved_tensors)
        return *scaled, None, None


def chunked_cross_entropy(
    x_ND: Float[Tensor, "N D"], weight_VD: Float[Tensor, "V D"], targets_N: Int[Tensor, "N"], chunk: int
) -> Float[Tensor, ""]:
    """Sum of −log softmax(x · weightᵀ)[target] over the targets ≥ 0, in fp32. `chunk` rows of logits exist at a time."""
    if torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad):
        return _ChunkedCrossEntropy.apply(x_ND, weight_VD, targets_N, chunk)  # pyright: ignore[reportReturnType]
    operand_VD = _logits_operand(weight_VD)
    parts = zip(x_ND.split(chunk), targets_N.split(chunk), strict=True)
    return torch.cat([_losses(x_CD, operand_VD, targets_C)[0] for x_CD, targets_C in parts]).sum()
