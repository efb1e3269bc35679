"""The embedding and the output matrix, which are untied: tokens → embeddings, hidden states → losses or logits.

Shapes: B rows, T tokens, D hidden, V vocabulary (this rank's rows of it under tensor parallelism).
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
    """The embedding matrix [V, D], with one row per token."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.first_row: int | None = None
        """Token of this rank's first row; None if all rows are on this rank.

        Tokens of other ranks' rows give zeros; the caller sums over the ranks.
        """
        nn.init.normal_(self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map integers [...] to embeddings [..., D]."""
        weight_VD = local(self.weight)
        if self.first_row is None:
            return F.embedding(tokens, weight_VD)
        rows = tokens - self.first_row
        elsewhere = (rows < 0) | (rows >= weight_VD.shape[0])
        return F.embedding(rows.masked_fill(elsewhere, 0), weight_VD).masked_fill(elsewhere.unsqueeze(-1), 0.0)


@runtime_checkable
class LossObserver(Protocol):
    """Receives the losses of each training pass of the output matrix to which it is attached."""

    def observe(self, losses_N: Float[Tensor, "N"], weights_N: Float[Tensor, "N"]) -> None:
        """Take the loss of each token times its weight, and the weights; both without gradient."""
        ...


class OutputHead(nn.Module):
    """The output matrix [V, D]. In training, the logits of all tokens never exist at the same time."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.shard: VocabShard | None = None
        """The rows of the vocabulary on this rank; None if all rows are."""
        self.observer: LossObserver | None = None
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_BTD: Tensor, read: Callable[[Tensor, Tensor, VocabShard | None], Result]) -> Result:
        """Return `read(x_ND, weight_VD, shard)`, where `read` is one of the functions of `nn/loss.py`.

        The function is an argument so that the same hooks on this module, which gather the weight or the sequence,
        serve all of them.
        """
        return read(x_BTD.flatten(0, 1), local(self.weight), self.shard)
