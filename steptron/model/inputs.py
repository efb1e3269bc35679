"""One micro-batch as a rank's model reads it: tokens, what each position is to predict, and document borders.

    rows of the batch, whole ─ pieces of the sequence that this rank holds ─► tokens and targets by head, packing

Under context parallelism a rank holds pieces of each row; it reads the rows whole, so that every shift and border is known without
asking anyone. Head 0 is the output matrix, head h > 0 an MTP head: it reads the token h places after a position and predicts the
one after that.

Legend: B rows, T tokens of a row that are here, S tokens read of a row (its length, and one more for each head), H heads, MTP and output.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steptron.nn.loss import IGNORED
from steptron.nn.packing import Packing

Pieces = tuple[tuple[int, int], ...]
"""Ranges [start, stop) of a row's tokens, in the order in which a rank holds them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What a forward pass needs besides the parameters."""

    tokens_HBT: Tensor
    """int64. Head h's input: the tokens h places after each position."""
    targets_HBT: Tensor
    """int64. What head h is to predict; negative where the document has ended before."""
    packing: Packing
    """Documents of the rows, positions of the tokens here."""
    sources_B: Tensor
    """int64. Number of each row's source; for statistics only."""

    @classmethod
    def from_rows(
        cls,
        tokens_BS: Tensor,
        documents_BS: Tensor,
        seq_len: int,
        pieces: Pieces | None = None,
        sources: Sequence[int] | None = None,
    ) -> "Inputs":
        """From whole rows on the CPU. `pieces`: which tokens are this rank's; None: all. `sources`: by row; None: one and the same."""
        heads = tokens_BS.shape[1] - seq_len
        whole = ((0, seq_len),)
        places_T = torch.cat([torch.arange(start, stop) for start, stop in pieces or whole])
        tokens = [tokens_BS[:, places_T + h] for h in range(heads)]
        targets = [shifted_targets(tokens_BS, documents_BS, seq_len, h + 1)[:, places_T] for h in range(heads)]
        packing = Packing.from_documents(documents_BS[:, :seq_len], pieces)
        sources_B = torch.zeros(len(tokens_BS), dtype=torch.int64) if sources is None else torch.tensor(sources)
        return cls(
            tokens_HBT=torch.stack(tokens), targets_HBT=torch.stack(targets), packing=packing, sources_B=sources_B
        )

    def to(self, device: torch.device | str) -> "Inputs":
        """The same on `device`."""
        return replace(
            self,
            tokens_HBT=self.tokens_HBT.to(device),
            targets_HBT=self.targets_HBT.to(device),
            packing=self.packing.to(device),
            sources_B=self.sources_B.to(device),
        )


def shifted_targets(tokens_BS: Tensor, documents_BS: Tensor, seq_len: int, ahead: int) -> Tensor:
    """Targets [B, seq_len] of the head that looks `ahead` tokens ahead (1: the next one); −100 where the document ends before."""
    target_BT = tokens_BS[:, ahead : ahead + seq_len]
    same_BT = documents_BS[:, ahead : ahead + seq_len] == documents_BS[:, :seq_len]
    return torch.where(same_BT, target_BT, IGNORED)


def count_targets(documents_BS: Tensor, seq_len: int) -> Tensor:
    """Unmasked targets of each head, int64 [H]."""
    here_BT = documents_BS[:, :seq_len]
    heads = documents_BS.shape[1] - seq_len
    return torch.stack([(documents_BS[:, a : a + seq_len] == here_BT).sum() for a in range(1, heads + 1)])
