"""Cross-entropy of the output matrix, summed over targets, without ever holding the logits of all tokens.

    x_ND ─ chunks of rows ─► logits ─► loss
                                └─► softmax − one-hot ─► gradients of x and of the weight, at once

The gradient of a sum of losses does not depend on what comes after it, up to one factor. So both gradients are made while a chunk's
logits exist, and backward only multiplies: three matrix products instead of the four of recomputing, and one chunk of memory.
Logits, softmax, loss and the sum of the weight's gradient are fp32 for bf16 operands too.

Shapes: N tokens, D hidden, V vocabulary (this rank's rows of it), C tokens of a chunk.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from steptron.nn.matmul import matmul_nt

IGNORED = -100
"""Target of a token that has none. Any negative target counts as masked."""


class VocabShard(NamedTuple):
    """A rank's rows of the vocabulary, where the output matrix is split over the ranks of a group."""

    group: ProcessGroup
    ranks: int
    first_row: int


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


def _losses(
    x_CD: Tensor, operand_VD: Tensor, targets_C: Tensor, shard: VocabShard | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss by token [C], 0 where masked; probabilities [C, V]; the target's column here [C], and whether it is here [C]."""
    logits_CV = _logits(x_CD, operand_VD)
    columns_C = targets_C if shard is None else targets_C - shard.first_row
    here_C = (columns_C >= 0) & (columns_C < logits_CV.shape[1])
    columns_C = columns_C.masked_fill(~here_C, 0)
    picked_C = logits_CV.gather(1, columns_C.unsqueeze(1)).squeeze(1).masked_fill_(~here_C, 0.0)
    highest_C = logits_CV.amax(dim=1)
    probabilities_CV = torch.softmax(logits_CV, dim=1)
    # The highest probability is 1 / Σ exp(logit − highest), which is all that log-sum-exp lacks.
    log_sum_exp_C = highest_C - probabilities_CV.amax(dim=1).log_()
    if shard is not None:
        here_sum_C = log_sum_exp_C
        log_sum_exp_C, picked_C = _over_shards(log_sum_exp_C, picked_C, shard)
        probabilities_CV.mul_(torch.exp(here_sum_C - log_sum_exp_C).unsqueeze(1))
    return (log_sum_exp_C - picked_C).masked_fill_(targets_C < 0, 0.0), probabilities_CV, columns_C, here_C


def _over_shards(log_sum_exp_C: Tensor, picked_C: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The same two over the rows of all ranks."""
    here_2C = torch.stack([log_sum_exp_C, picked_C])
    all_2C = [torch.empty_like(here_2C) for _ in range(shard.ranks)]
    dist.all_gather(all_2C, here_2C, group=shard.group)
    sums, picked = torch.stack(all_2C).unbind(1)
    return torch.logsumexp(sums, dim=0), picked.sum(dim=0)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, shard: VocabShard | None
    ) -> tuple[Tensor, Tensor]:
        wide, narrow = _wide(weight_VD.dtype), weight_VD.dtype
        operand_VD = _logits_operand(weight_VD)
        losses_N = torch.empty(x_ND.shape[0], dtype=wide, device=x_ND.device)
        grad_x_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        grad_w_VD = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, x_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            x_CD, targets_C = x_ND[rows], targets_N[rows]
            losses_N[rows], grad_CV, columns_C, here_C = _losses(x_CD, operand_VD, targets_C, shard)
            grad_CV[torch.arange(len(targets_C), device=x_ND.device), columns_C] -= here_C.to(wide)
            grad_CV = grad_CV.to(narrow)
            # A masked token's row is zeroed in the thin operands, which is cheaper than in its wide gradient.
            masked_C1 = (targets_C < 0).unsqueeze(1)
            grad_x_ND[rows] = matmul_nt(grad_CV, weight_VD.mT).masked_fill_(masked_C1, 0.0)
            if grad_w_VD is not None:
                grad_w_VD += matmul_nt(grad_CV.mT, x_CD.masked_fill(masked_C1, 0.0).mT)
        ctx.save_for_backward(grad_x_ND, None if grad_w_VD is None else grad_w_VD.to(narrow))
        ctx.mark_non_differentiable(losses_N)
        return _share(losses_N.sum(), shard), losses_N

    @staticmethod
    def backward(ctx, *grads: Any):
        # In fp32: 1 / targets rounded to bf16 would scale every gradient of the step by up to 1.002.
        scaled = (None if g is None else (g.to(grads[0].dtype) * grads[0]).to(g.dtype) for g in ctx.saved_tensors)
        return *scaled, None, None, None


def _share(loss: Tensor, shard: VocabShard | None) -> Tensor:
    """A rank's share of a loss that all ranks of the shard have computed. The gradient needs no division: what each rank's
    rows add to all the shares is what they add to the whole loss."""
    return loss if shard is None else loss / shard.ranks


def chunked_cross_entropy(
    x_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    targets_N: Int[Tensor, "N"],
    chunk: int,
    shard: VocabShard | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "N"]]:
    """Sum of −log softmax(x · weightᵀ)[target] over the targets ≥ 0, in fp32, and each token's, without gradient, 0 where masked.

    `chunk` rows of logits exist at a time.

    With a shard, `weight` is this rank's rows of the vocabulary, x and targets are the same on all its ranks, the shares of the
    loss add up over them, and so do the gradients of x."""
    if torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad):
        return _ChunkedCrossEntropy.apply(x_ND, weight_VD, targets_N, chunk, shard)  # pyright: ignore[reportReturnType]
    operand_VD = _logits_operand(weight_VD)
    parts = zip(x_ND.split(chunk), targets_N.split(chunk), strict=True)
    losses_N = torch.cat([_losses(x_CD, operand_VD, targets_C, shard)[0] for x_CD, targets_C in parts])
    return _share(losses_N.sum(), shard), losses_N.detach()
