"""Losses, log-probabilities and logits of the output matrix, computed one chunk of tokens at a time.

    x_ND ─ chunks of rows ─► logits ─► log p of the target ─ rule ─► loss, derivative
                                └─► (softmax − one-hot) · −derivative ─► gradients of x and of the weight, at once

A loss is any function of the log-probability of each token's target; a rule returns its value and its derivative. The
gradient of a sum of such losses does not depend on later operations, except for one factor. So both gradients are
computed while the logits of a chunk exist, and backward only multiplies: this takes three matrix products instead of
the four of recomputation, and the memory of one chunk. Logits, softmax, loss and the sum of the weight's gradient are
fp32 for bf16 operands too.

Shapes: N tokens, D hidden, V vocabulary (this rank's rows of it), C tokens of a chunk, K constants of a rule.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from steptron.config.schema import Chunk
from steptron.errors import LossRuleError
from steptron.nn.matmul import matmul_nt
from steptron.nn.roofs import ROOFS, TF32_SHARE, Roofs, roofs

Rule = Callable[..., tuple[Tensor, Tensor]]
"""Maps (log p of each target [C], any number of constants [C]) to (loss [C], derivative of the loss by log p [C]).

A rule runs without autograd.
"""


_STEP = 256
"""The number of rows that `auto` takes on a CPU. On CUDA it takes a multiple of it."""
_MOST = 4096
"""The largest number of rows that `auto` takes: their fp32 logits over 128,896 tokens take 2.1 GB."""


def rows_at_once(chunk: Chunk, x_ND: Tensor, weight_VD: Tensor) -> int:
    """Return the rows of a chunk. The meta device, on which memory is counted, stands for an H800."""
    if chunk != "auto":
        return chunk
    if x_ND.device.type not in ("cuda", "meta"):
        return _STEP
    peaks = (roofs(x_ND.device) if x_ND.is_cuda else None) or ROOFS["H800"]
    return compute_bound_rows(weight_VD.shape[1], weight_VD.shape[0], weight_VD.dtype.itemsize, peaks)


def compute_bound_rows(hidden: int, vocab: int, width: int, peaks: Roofs) -> int:
    """Return the smallest number of rows r, a multiple of 256, at which the three products of a chunk (logits, gradient
    of x, gradient of the weight) take at least as long as the bytes that they move; 4096 where no number does.

    With D = hidden, V = rows of the vocabulary here, w = width (bytes of an element of x and of the weight), P = peak
    of products of that width [1/s], B = bandwidth [bytes/s]:

        6·r·D·V / P  ≥  (D·V·(4w + 8) + r·(V·(4 + 2w) + 3·w·D)) / B

    Per chunk the weight is read twice, and its gradient is written, read again and added to a sum in fp32: 4w + 8 bytes
    per element. Per row, logits are written in fp32, their gradient is read twice, x is read twice, and its gradient is
    written. The roofline model is that of Williams, Waterman and Patterson (2009).
    """
    peak = peaks.bf16_flops * (1.0 if width == 2 else TF32_SHARE)
    per_chunk = hidden * vocab * (4 * width + 8) / peaks.bandwidth
    per_row = 6 * hidden * vocab / peak - (vocab * (4 + 2 * width) + 3 * width * hidden) / peaks.bandwidth
    if per_row * _MOST <= per_chunk:
        return _MOST
    return -(-math.ceil(per_chunk / per_row) // _STEP) * _STEP


def cross_entropy(log_prob_C: Tensor, *constants_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return −log p and its derivative, −1. This is the rule of pretraining; it reads no constants."""
    return -log_prob_C, torch.full_like(log_prob_C, -1.0)


class VocabShard(NamedTuple):
    """The rows of the vocabulary on this rank, if the output matrix is split over the ranks of a group."""

    group: ProcessGroup
    ranks: int
    first_row: int


class _Targets(NamedTuple):
    """The softmax of a chunk, and the column of each target in it."""

    log_prob_C: Tensor
    """log p of the target over the complete vocabulary."""
    probabilities_CV: Tensor
    """Probabilities of this rank's rows of the vocabulary."""
    columns_C: Tensor
    """The target's column on this rank; 0 if it is on another rank."""
    here_C: Tensor
    """True if the target's column is on this rank."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _logits_operand(weight_VD: Tensor) -> Tensor:
    """Return the weight in the dtype that the logits' product needs.

    CUDA multiplies bf16 operands into fp32 results; elsewhere the operands must be fp32.
    """
    return weight_VD if weight_VD.is_cuda else weight_VD.to(_wide(weight_VD.dtype))


def _logits(x_CD: Tensor, operand_VD: Tensor) -> Tensor:
    wide = _wide(x_CD.dtype)
    if operand_VD.dtype is not wide:
        return torch.mm(x_CD, operand_VD.mT, out_dtype=wide)
    return matmul_nt(x_CD.to(wide), operand_VD)


def _softmax(x_CD: Tensor, operand_VD: Tensor, targets_C: Tensor, shard: VocabShard | None) -> _Targets:
    logits_CV = _logits(x_CD, operand_VD)
    columns_C = targets_C if shard is None else targets_C - shard.first_row
    here_C = (columns_C >= 0) & (columns_C < logits_CV.shape[1])
    columns_C = columns_C.masked_fill(~here_C, 0)
    picked_C = logits_CV.gather(1, columns_C.unsqueeze(1)).squeeze(1).masked_fill_(~here_C, 0.0)
    highest_C = logits_CV.amax(dim=1)
    probabilities_CV = torch.softmax(logits_CV, dim=1)
    # The highest probability is 1 / Σ exp(logit − highest), which gives log-sum-exp without another pass over the
    # logits.
    log_sum_exp_C = highest_C - probabilities_CV.amax(dim=1).log_()
    if shard is not None:
        here_sum_C = log_sum_exp_C
        log_sum_exp_C, picked_C = _over_shards(log_sum_exp_C, picked_C, shard)
        probabilities_CV.mul_(torch.exp(here_sum_C - log_sum_exp_C).unsqueeze(1))
    return _Targets(picked_C - log_sum_exp_C, probabilities_CV, columns_C, here_C)


def _over_shards(log_sum_exp_C: Tensor, picked_C: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp and the targets' logits over the rows of all ranks."""
    here_2C = torch.stack([log_sum_exp_C, picked_C])
    all_2C = [torch.empty_like(here_2C) for _ in range(shard.ranks)]
    dist.all_gather(all_2C, here_2C, group=shard.group)
    sums, picked = torch.stack(all_2C).unbind(1)
    return torch.logsumexp(sums, dim=0), picked.sum(dim=0)


def _apply_rule(rule: Rule, log_prob_C: Tensor, weights_C: Tensor, constants_KC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted loss and its derivative by log p, both 0 where the weight is 0, even if the rule gives NaN.

    Raises `LossRuleError` if the rule does not return two floating-point tensors of the shape of `log_prob_C`.
    """
    values = rule(log_prob_C, *constants_KC)
    if not (isinstance(values, tuple) and len(values) == 2 and all(_fits(value, log_prob_C) for value in values)):
        name = getattr(rule, "__name__", type(rule).__name__)
        raise LossRuleError(
            f"the loss rule {name} returned {_described(values)} for {tuple(log_prob_C.shape)} targets; it must return "
            f"a pair, loss and derivative, of floating-point tensors of that shape: correct the rule"
        )
    masked_C = weights_C == 0
    loss_C, derivative_C = ((value * weights_C).masked_fill_(masked_C, 0.0) for value in values)
    return loss_C, derivative_C


def _fits(value: object, log_prob_C: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == log_prob_C.shape and value.is_floating_point()


def _described(values: object) -> str:
    if isinstance(values, Tensor):
        return f"a tensor {tuple(values.shape)} of {values.dtype}".replace("torch.", "")
    if isinstance(values, tuple):
        return f"({', '.join(_described(value) for value in values)})"
    return f"a {type(values).__name__}"


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        constants_KN: Tensor,
        rule: Rule,
        chunk: int,
        shard: VocabShard | None,
    ) -> tuple[Tensor, Tensor]:
        wide, narrow = _wide(weight_VD.dtype), weight_VD.dtype
        operand_VD = _logits_operand(weight_VD)
        losses_N = torch.empty(x_ND.shape[0], dtype=wide, device=x_ND.device)
        grad_x_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        grad_w_VD = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, x_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            x_CD = x_ND[rows]
            log_prob_C, grad_CV, columns_C, here_C = _softmax(x_CD, operand_VD, targets_N[rows], shard)
            losses_N[rows], derivative_C = _apply_rule(rule, log_prob_C, weights_N[rows], constants_KN[:, rows])
            grad_CV[torch.arange(len(columns_C), device=x_ND.device), columns_C] -= here_C.to(wide)
            grad_CV = grad_CV.to(narrow)
            # Multiply the thin operands by the token's factor: that is cheaper than multiplying the wide gradient of
            # the logits.
            factor_C1 = -derivative_C.unsqueeze(1)
            grad_x_ND[rows] = matmul_nt(grad_CV, weight_VD.mT) * factor_C1
            if grad_w_VD is not None:
                grad_w_VD += matmul_nt(grad_CV.mT, (x_CD * factor_C1).to(narrow).mT)
        ctx.save_for_backward(grad_x_ND, None if grad_w_VD is None else grad_w_VD.to(narrow))
        ctx.mark_non_differentiable(losses_N)
        return _share(losses_N.sum(), shard), losses_N

    @staticmethod
    def backward(ctx, *grads: Any):
        # Multiply in fp32: 1 / targets rounded to bf16 would scale every gradient of the step by up to 1.002.
        scaled = (None if g is None else (g.to(grads[0].dtype) * grads[0]).to(g.dtype) for g in ctx.saved_tensors)
        return *scaled, None, None, None, None, None, None


def _share(loss: Tensor, shard: VocabShard | None) -> Tensor:
    """Return this rank's share of a loss that every rank of the shard has computed.

    The gradient needs no division: each rank's rows add the same to the sum of all shares as to the complete loss.
    """
    return loss if shard is None else loss / shard.ranks


def chunked_loss(
    x_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    shard: VocabShard | None,
    *,
    targets_N: Int[Tensor, "N"],
    weights_N: Float[Tensor, "N"],
    constants_KN: Float[Tensor, "K N"],
    rule: Rule,
    chunk: Chunk,
) -> tuple[Float[Tensor, ""], Float[Tensor, "N"]]:
    """Return Σ weight · rule(log softmax(x · weightᵀ)[target]) in fp32, and each token's term without gradient [N].

    A token of weight 0 adds nothing to the loss or to a gradient. Only `chunk` rows of logits exist at a time (`auto`:
    `compute_bound_rows` on CUDA, else 256).

    With a shard, `weight` is this rank's rows of the vocabulary, while x, targets, weights and constants are the same
    on all ranks of the shard. The ranks' shares of the loss add up to the loss, and so do the gradients of x.

    Raises `LossRuleError` if the rule does not return two floating-point tensors of the shape of the log-probabilities.
    """
    if torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad):
        rows = rows_at_once(chunk, x_ND, weight_VD)
        arguments = (x_ND, weight_VD, targets_N, weights_N, constants_KN, rule, rows, shard)
        return _ChunkedLoss.apply(*arguments)  # pyright: ignore[reportReturnType]
    log_prob_N = chunked_log_probs(x_ND, weight_VD, shard, targets_N=targets_N, chunk=chunk)
    losses_N, _ = _apply_rule(rule, log_prob_N, weights_N, constants_KN)
    return _share(losses_N.sum(), shard), losses_N


@torch.no_grad()
def chunked_log_probs(
    x_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    shard: VocabShard | None,
    *,
    targets_N: Int[Tensor, "N"],
    chunk: Chunk,
) -> Float[Tensor, "N"]:
    """Return log softmax(x · weightᵀ)[target] in fp32, without gradient [N].

    The bits are those that `chunked_loss` passes to its rule. With a shard, the softmax is over the complete
    vocabulary, and all ranks of the shard get the result.
    """
    operand_VD, rows = _logits_operand(weight_VD), rows_at_once(chunk, x_ND, weight_VD)
    parts = zip(x_ND.split(rows), targets_N.split(rows), strict=True)
    return torch.cat([_softmax(x_CD, operand_VD, targets_C, shard).log_prob_C for x_CD, targets_C in parts])


@torch.no_grad()
def chunked_predictions(
    x_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    shard: VocabShard | None,
    *,
    targets_N: Int[Tensor, "N"],
    chunk: Chunk,
) -> Float[Tensor, "2 N"]:
    """Return log softmax(x · weightᵀ)[target] and the token with the highest probability, fp32, without gradient.

    Row 0 has the bits of `chunked_log_probs`. Row 1 is a token id, exact below 2²⁴; of equal ones it is the lowest.
    With a shard, the vocabulary is the complete one, and all ranks of the shard get the result.
    """
    operand_VD, rows = _logits_operand(weight_VD), rows_at_once(chunk, x_ND, weight_VD)
    parts = zip(x_ND.split(rows), targets_N.split(rows), strict=True)
    return torch.cat([_predict(_softmax(x_CD, operand_VD, targets_C, shard), shard) for x_CD, targets_C in parts], 1)


def _predict(found: _Targets, shard: VocabShard | None) -> Tensor:
    """Return log p of the targets and the most probable tokens of a chunk [2, C]."""
    highest_C, best_C = found.probabilities_CV.max(dim=1)
    best_C = best_C.to(highest_C.dtype)
    if shard is not None:
        here_2C = torch.stack([highest_C, best_C + shard.first_row])
        all_2C = [torch.empty_like(here_2C) for _ in range(shard.ranks)]
        dist.all_gather(all_2C, here_2C, group=shard.group)
        highest_RC, best_RC = torch.stack(all_2C).unbind(1)
        best_C = best_RC.gather(0, highest_RC.argmax(dim=0, keepdim=True)).squeeze(0)
    return torch.stack([found.log_prob_C, best_C])


@torch.no_grad()
def chunked_logits(
    x_ND: Float[Tensor, "N D"], weight_VD: Float[Tensor, "V D"], shard: VocabShard | None, *, chunk: Chunk
) -> Float[Tensor, "N all_V"]:
    """Return x · weightᵀ in fp32, without gradient. With a shard, all its ranks get all columns."""
    operand_VD, rows = _logits_operand(weight_VD), rows_at_once(chunk, x_ND, weight_VD)
    logits_NV = torch.cat([_logits(x_CD, operand_VD) for x_CD in x_ND.split(rows)])
    if shard is None:
        return logits_NV
    parts = [torch.empty_like(logits_NV) for _ in range(shard.ranks)]
    dist.all_gather(parts, logits_NV, group=shard.group)
    return torch.cat(parts, dim=1)
