"""Losses, log-probabilities and logits: the output matrices applied to the final hidden states.

    Outputs, Inputs ─► a loss ─► LossSums, whose gradient is taken
    Outputs, Inputs ─► a reading ─► log-probabilities, most probable tokens, logits

The code that runs the network receives a loss or a reading as a function. The rank of the last part calls it once per
micro-batch.

Legend: H heads (output and MTP), B rows, T tokens of the sequence on this rank, N = B·T, V vocabulary, K constants of a
rule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from steptron.config.schema import Chunk
from steptron.model.inputs import Inputs
from steptron.model.mtp import MtpHead
from steptron.model.transformer import Outputs, Transformer
from steptron.nn.embedding import OutputHead
from steptron.nn.loss import (
    Rule,
    chunked_log_probs,
    chunked_logits,
    chunked_loss,
    chunked_predictions,
    cross_entropy,
)


class LossSums(NamedTuple):
    """The losses of a micro-batch, summed but not divided, fp32.

    Only the step knows the weights of the global batch, by which it divides.
    """

    heads_H: Tensor
    """Σ weight · loss over the targets of the output matrix, then of each MTP head."""
    balance: Tensor
    """Balance losses times their coefficients, summed over rows and layers."""


Loss = Callable[[Transformer, Outputs, Inputs], LossSums]
"""Maps (last part, its outputs, the micro-batch) to sums of losses."""

Reading = Callable[[Transformer, Outputs, Inputs], Tensor]
"""Maps (last part, its outputs, the micro-batch) to a tensor of any shape, without gradient."""


@dataclass(frozen=True)
class TokenLoss:
    """A loss that is a weighted sum over single targets.

    The output matrix uses the rule, MTP heads use cross-entropy.
    """

    rule: Rule = cross_entropy
    """The rule of the output matrix; it receives `Inputs.constants_KBT`."""

    def __call__(self, part: Transformer, outputs: Outputs, inputs: Inputs) -> LossSums:
        """Return the sums. Raises `LossRuleError` if the rule returns tensors of another shape."""
        heads = _output_heads(part)
        hidden = (outputs.hidden_BTD, *outputs.mtp_BTD)
        assert len(hidden) == len(heads), "a loss needs rows with one token ahead per MTP head"
        rules = (self.rule, *(cross_entropy for _ in part.mtp))
        sums = [
            _head_loss(head, x_BTD, inputs, h, rule, part.config.loss_chunk)
            for h, (head, x_BTD, rule) in enumerate(zip(heads, hidden, rules, strict=True))
        ]
        return LossSums(torch.stack(sums), outputs.balance)


def _head_loss(head: OutputHead, x_BTD: Tensor, inputs: Inputs, h: int, rule: Rule, chunk: Chunk) -> Tensor:
    """Return the sum of the losses of head h, and pass the losses to its observer."""
    weights_N = inputs.weights_HBT[h].flatten()
    read = partial(
        chunked_loss,
        targets_N=inputs.targets_HBT[h].flatten(),
        weights_N=weights_N,
        constants_KN=inputs.constants_KBT.flatten(1),
        rule=rule,
        chunk=chunk,
    )
    total, losses_N = head(x_BTD, read)
    if head.observer is not None:
        head.observer.observe(losses_N, weights_N)
    return total


def log_probs(part: Transformer, outputs: Outputs, inputs: Inputs) -> Tensor:
    """Return log p of the token after each position [B, T], fp32. This function is a `Reading`."""
    return _log_probs(part.lm_head, outputs.hidden_BTD, inputs, 0, part.config.loss_chunk)


def head_log_probs(part: Transformer, outputs: Outputs, inputs: Inputs) -> Tensor:
    """Return log p of each head's target at each position [H, B, T], fp32. This function is a `Reading`.

    `inputs` must have one token ahead per MTP head.
    """
    heads = zip(_output_heads(part), (outputs.hidden_BTD, *outputs.mtp_BTD), strict=True)
    chunk = part.config.loss_chunk
    return torch.stack([_log_probs(head, x_BTD, inputs, h, chunk) for h, (head, x_BTD) in enumerate(heads)])


def _output_heads(part: Transformer) -> list[OutputHead]:
    return [part.lm_head, *(cast(MtpHead, head).lm_head for head in part.mtp.values())]


def _log_probs(head: OutputHead, x_BTD: Tensor, inputs: Inputs, h: int, chunk: Chunk) -> Tensor:
    read = partial(chunked_log_probs, targets_N=inputs.targets_HBT[h].flatten(), chunk=chunk)
    return head(x_BTD, read).view(inputs.targets_HBT.shape[1:])


def predictions(part: Transformer, outputs: Outputs, inputs: Inputs) -> Tensor:
    """Return log p of the token after each position and the most probable token there [2, B, T], fp32.

    This function is a `Reading`; see `nn.loss.chunked_predictions`.
    """
    read = partial(chunked_predictions, targets_N=inputs.targets_HBT[0].flatten(), chunk=part.config.loss_chunk)
    return part.lm_head(outputs.hidden_BTD, read).view(2, *inputs.tokens_HBT.shape[1:])


def logits(part: Transformer, outputs: Outputs, inputs: Inputs) -> Tensor:
    """Return the logits of the token after each position [B, T, V], fp32. This function is a `Reading`."""
    found_NV = part.lm_head(outputs.hidden_BTD, partial(chunked_logits, chunk=part.config.loss_chunk))
    return found_NV.view(*inputs.tokens_HBT.shape[1:], -1)
