"""The ends of the network: tokens → embeddings, and final hidden states → losses, log-probabilities or logits. The two matrices are untied.

Shapes: B rows, T tokens, D hidden, V vocabulary (under tensor parallelism a rank's rows of it).
"""

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from steptron.nn.loss import VocabShard
from steptron.nn.to_local import local

Result = TypeVar("Result")


class Embedding(nn.Module):
    """weight [V, D]: a row a token."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.first_row: int | None = None
        """Token of this rank's first row; None: all rows are here. Other ranks' tokens give zeros, to be summed from outside."""
        nn.init.normal_(self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Integers [...] → [..., D]."""
        weight_VD = local(self.weight)
        if self.first_row is None:
            return F.embedding(tokens, weight_VD)
        rows = tokens - self.first_row
        elsewhere = (rows < 0) | (rows >= weight_VD.shape[0])
        return F.embedding(rows.masked_fill(elsewhere, 0), weight_VD).masked_fill(elsewhere.unsqueeze(-1), 0.0)


@runtime_checkable
class LossObserver(Protocol):
    """Sees the losses of each training pass of the output matrix that it is hung on."""

    def observe(self, losses_N: Float[Tensor, "N"], weights_N: Float[Tensor, "N"]) -> None:
        """Take each token's loss times its weight, and the weights; no gradient passes."""
        ...


class OutputHead(nn.Module):
    """weight [V, D], from hidden states to what is read of the vocabulary: in training the logits of all tokens never exist."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.shard: VocabShard | None = None
        """Which rows of the vocabulary this rank has; None: all."""
        self.observer: LossObserver | None = None
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_BTD: Tensor, read: Callable[[Tensor, Tensor, VocabShard | None], Result]) -> Result:
        """Return `read(x_ND, weight_VD, shard)`, one of the functions of `nn/loss.py`.

        What reads the matrix comes as an argument, so that hooks on this module (which gather the weight or the sequence) serve all."""
        return read(x_BTD.flatten(0, 1), local(self.weight), self.shard)
