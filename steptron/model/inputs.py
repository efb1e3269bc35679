"""The inputs of one micro-batch: from the rows of the data to the tokens, weighted targets and packing on a rank.

    Rows, complete ─ pieces of the sequence on this rank ─► Inputs: tokens, targets and weights by head, packing

Under context parallelism a rank holds pieces of each row. It reads the complete rows, so that it knows every shift and
border without communication. Head 0 is the output matrix; head h > 0 is an MTP head, which reads the token h positions
ahead and predicts the one after that.

Legend: B rows, T tokens of a row on this rank, S tokens read of a row (its length, plus one per head), H heads (output
and MTP), K constants of a loss rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steptron.nn.packing import Packing
from steptron.nn.to_device import to_device

Pieces = tuple[tuple[int, int], ...]
"""Ranges [start, stop) of a row's tokens, in the order in which a rank holds them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Complete rows on the CPU, as the data yields them."""

    tokens_BS: Tensor
    """int64. The first T are inputs. Targets are the token after each input and, for MTP heads, those after that."""
    documents_BS: Tensor
    """int32, numbered from 0 in each row. A target in another document than its input has weight 0."""
    weights_BS: Tensor
    """float32, ≥ 0. The weight of each token as a target: 1 in pretraining; 0 masks the target."""
    constants_KBS: Tensor
    """float32. Inputs of a loss rule about each token as a target of the output matrix, besides its log-probability.

    K is 0 for most rules.
    """

    @classmethod
    def unweighted(cls, tokens_BS: Tensor, documents_BS: Tensor) -> "Rows":
        """Return rows in which every token has weight 1 as a target, as in pretraining."""
        return cls(
            tokens_BS=tokens_BS,
            documents_BS=documents_BS,
            weights_BS=torch.ones(tokens_BS.shape),
            constants_KBS=torch.zeros(0, *tokens_BS.shape),
        )

    def cut(self, size: int) -> "Rows":
        """Return the first `size` tokens of each row."""
        return Rows(
            tokens_BS=self.tokens_BS[:, :size],
            documents_BS=self.documents_BS[:, :size],
            weights_BS=self.weights_BS[:, :size],
            constants_KBS=self.constants_KBS[:, :, :size],
        )

    def targets(self, seq_len: int, head: int) -> tuple[Tensor, Tensor]:
        """Return the targets of `head` (0: the output matrix) at the first `seq_len` tokens, int64, and their weights.

        Both are [B, seq_len]. The weight is that of the predicted token, or 0 if it belongs to another document.
        """
        there = slice(1 + head, 1 + head + seq_len)
        same_BT = self.documents_BS[:, there] == self.documents_BS[:, :seq_len]
        return self.tokens_BS[:, there], self.weights_BS[:, there] * same_BT

    def sum_weights(self, seq_len: int) -> Tensor:
        """Return Σ weight of each head's targets, float64 [H]; the sums are exact for integer weights."""
        heads = self.tokens_BS.shape[1] - seq_len
        return torch.stack([self.targets(seq_len, head)[1].double().sum() for head in range(heads)])


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """The inputs of a forward pass and of its loss, besides the parameters."""

    tokens_HBT: Tensor
    """int64. The input of head h: the token h positions ahead of each position."""
    targets_HBT: Tensor
    """int64. The token that head h predicts at each position, also where its weight is 0."""
    weights_HBT: Tensor
    """float32. The weight of each target; 0 if it is masked or belongs to another document."""
    constants_KBT: Tensor
    """float32. Inputs of a loss rule about each target of head 0."""
    packing: Packing
    """Document borders of the rows, and positions of this rank's tokens."""
    sources_B: Tensor
    """int64. Number of each row's source, for statistics only."""

    @classmethod
    def from_rows(
        cls, rows: Rows, seq_len: int, pieces: Pieces | None = None, sources: Sequence[int] | None = None
    ) -> "Inputs":
        """Return this rank's part of the rows.

        `pieces` are the ranges of a row on this rank; None means all of it. `sources` gives the source of each row;
        None means that all rows have source 0.
        """
        count, S = rows.tokens_BS.shape
        whole = ((0, seq_len),)
        places_T = torch.cat([torch.arange(start, stop) for start, stop in pieces or whole])
        targets, weights = zip(*(rows.targets(seq_len, head) for head in range(S - seq_len)), strict=True)
        return cls(
            tokens_HBT=torch.stack([rows.tokens_BS[:, places_T + h] for h in range(S - seq_len)]),
            targets_HBT=torch.stack([targets_BT[:, places_T] for targets_BT in targets]),
            weights_HBT=torch.stack([weights_BT[:, places_T] for weights_BT in weights]),
            constants_KBT=rows.constants_KBS[:, :, places_T + 1],
            packing=Packing.from_documents(rows.documents_BS[:, :seq_len], pieces),
            sources_B=torch.zeros(count, dtype=torch.int64) if sources is None else torch.tensor(sources),
        )

    @classmethod
    def from_tokens(cls, tokens_BT: Tensor, pieces: Pieces | None = None) -> "Inputs":
        """Return the inputs of the output matrix alone, for logits.

        Each row is one document. Its last token has no target (weight 0).
        """
        after_BS = torch.nn.functional.pad(tokens_BT, (0, 1))
        documents_BS = torch.zeros(after_BS.shape, dtype=torch.int32)
        documents_BS[:, -1] = 1
        return cls.from_rows(Rows.unweighted(after_BS, documents_BS), tokens_BT.shape[1], pieces)

    def to(self, device: torch.device | str) -> "Inputs":
        """Return a copy on `device`."""
        return replace(
            self,
            tokens_HBT=to_device(self.tokens_HBT, device),
            targets_HBT=to_device(self.targets_HBT, device),
            weights_HBT=to_device(self.weights_HBT, device),
            constants_KBT=to_device(self.constants_KBT, device),
            packing=self.packing.to(device),
            sources_B=to_device(self.sources_B, device),
        )

    def tensors(self) -> list[Tensor]:
        """Return all tensors."""
        values = [*vars(self).values(), *vars(self.packing).values()]
        return [value for value in values if isinstance(value, Tensor)]
