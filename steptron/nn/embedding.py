"""The ends of the network: tokens → embeddings, and final hidden states → summed loss. The two matrices are untied.

Shapes: B rows, T tokens, D hidden, V vocabulary (under tensor parallelism a rank's rows of it).
"""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from steptron.nn.local import local
from steptron.nn.loss import VocabShard, chunked_cross_entropy


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
    """Sees the losses of each forward pass of the output matrix that it is hung on."""

    def observe(self, losses_N: Float[Tensor, "N"], targets_N: Int[Tensor, "N"]) -> None:
        """Loss of every token, 0 where its target is negative; no gradient passes."""
        ...


class OutputHead(nn.Module):
    """weight [V, D], together with its loss: logits of all tokens never exist."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.shard: VocabShard | None = None
        """Which rows of the vocabulary this rank has; None: all."""
        self.observer: LossObserver | None = None
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_BTD: Tensor, targets_BT: Tensor, chunk: int) -> Tensor:
        """Summed cross-entropy of the targets ≥ 0, an fp32 scalar; `chunk` tokens at a time. With a shard: this rank's share of it."""
        x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
        total, losses_N = chunked_cross_entropy(x_ND, local(self.weight), targets_N, chunk, self.shard)
        if self.observer is not None:
            self.observer.observe(losses_N, targets_N)
        return total
