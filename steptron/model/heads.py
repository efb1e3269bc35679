"""Losses, log-probabilities and logits: the output matrices applied to the final hidden states.

    Outputs, Inputs ─► a loss ─► LossSums, whose gradient is taken
    Outputs, Inputs ─► a reading ─► log-probabilities, most probable tokens, logits

The code that runs the network receives a loss or a reading. It is called once per part and micro-batch, and computes
what the output matrices of that part can.

Legend: H heads (output and MTP), B rows, T tokens of the sequence on this rank, N = B·T, V vocabulary, K constants of a
rule.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from steptron.config.schema import Chunk
from steptron.model.inputs import Inputs
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
"""Maps (a part, its outputs, the micro-batch) to the sums of losses so far: those in the outputs, and this part's."""


@dataclass(frozen=True)
class Reading:
    """A tensor by head of any shape, without gradient."""

    one: Callable[[OutputHead, Tensor, Inputs, int, Chunk], Tensor]
    """Maps (output matrix, its input [B, T, D], the micro-batch, the head, rows of logits at a time) to a tensor."""
    every_head: bool = False
    """If true, all heads that run are read and their tensors stacked. Otherwise it is the output matrix alone."""

    def heads(self, inputs: Inputs) -> range:
        """Return the heads that are read."""
        return range(len(inputs.tokens_HBT) if self.every_head else 1)

    def here(self, part: Transformer, outputs: Outputs, inputs: Inputs) -> dict[int, Tensor]:
        """Return the tensors of the heads whose output matrices are in the part."""
        chunk, wanted = part.config.loss_chunk, self.heads(inputs)
        applied = [(h, head, x_BTD) for h, head, x_BTD in _applied(part, outputs) if h in wanted]
        return {h: self.one(head, x_BTD, inputs, h, chunk) for h, head, x_BTD in applied}

    def joined(self, found: Mapping[int, Tensor]) -> Tensor:
        """Return the tensors of all heads as one."""
        return torch.stack([found[h] for h in sorted(found)]) if self.every_head else found[0]

    def __call__(self, network: Transformer, outputs: Outputs, inputs: Inputs) -> Tensor:
        """Return the reading of a complete network."""
        return self.joined(self.here(network, outputs, inputs))


def _applied(part: Transformer, outputs: Outputs) -> Iterator[tuple[int, OutputHead, Tensor]]:
    """Yield number, output matrix and input of the heads of this part that run."""
    for (h, head), x_BTD in zip(part.output_heads().items(), outputs.normed, strict=False):
        yield h, head, x_BTD


@dataclass(frozen=True)
class TokenLoss:
    """A loss that is a weighted sum over single targets.

    The output matrix uses the rule, MTP heads use cross-entropy.
    """

    rule: Rule = cross_entropy
    """The rule of the output matrix; it receives `Inputs.constants_KBT`."""

    def __call__(self, part: Transformer, outputs: Outputs, inputs: Inputs) -> LossSums:
        """Return the sums. Raises `LossRuleError` if the rule returns tensors of another shape."""
        *sums, balance = outputs.sums.unbind()
        for h, head, x_BTD in _applied(part, outputs):
            rule = cross_entropy if h else self.rule
            sums[h] = _head_loss(head, x_BTD, inputs, h, rule, part.config.loss_chunk)
        return LossSums(torch.stack(sums), balance)


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


def _log_probs(head: OutputHead, x_BTD: Tensor, inputs: Inputs, h: int, chunk: Chunk) -> Tensor:
    read = partial(chunked_log_probs, targets_N=inputs.targets_HBT[h].flatten(), chunk=chunk)
    return head(x_BTD, read).view(inputs.targets_HBT.shape[1:])


def _predictions(head: OutputHead, x_BTD: Tensor, inputs: Inputs, h: int, chunk: Chunk) -> Tensor:
    read = partial(chunked_predictions, targets_N=inputs.targets_HBT[h].flatten(), chunk=chunk)
    return head(x_BTD, read).view(2, *inputs.tokens_HBT.shape[1:])


def _logits(head: OutputHead, x_BTD: Tensor, inputs: Inputs, h: int, chunk: Chunk) -> Tensor:
    return head(x_BTD, partial(chunked_logits, chunk=chunk)).view(*inputs.tokens_HBT.shape[1:], -1)


log_probs = Reading(_log_probs)
"""log p of the token after each position [B, T], fp32."""

head_log_probs = Reading(_log_probs, every_head=True)
"""log p of each head's target at each position [H, B, T], fp32, of the output matrix and the MTP heads that run."""

predictions = Reading(_predictions)
"""log p of the token after each position and the most probable token there [2, B, T], fp32; see
`nn.loss.chunked_predictions`."""

logits = Reading(_logits)
"""The logits of the token after each position [B, T, V], fp32."""
