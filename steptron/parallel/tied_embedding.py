"""Keep a pipeline's two embeddings equal: the last part's gradient goes to the first, new values come back.

    backward: gradient of the last part's copy ─► added to that of the first part's copy
    optimizer step on the first part's copy alone (it is the one in checkpoints and in the gradient norm)
    afterwards: its values ─► the last part's copy

Both copies are sharded in the same way. So each rank exchanges only its shard, with the corresponding rank of the other
stage; if one rank has both parts, as in a V-shaped schedule, it exchanges nothing.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from steptron.model.transformer import Transformer
from steptron.nn.to_local import local


@dataclass(frozen=True, kw_only=True)
class TiedEmbedding:
    """The copies on this rank: `first` and `last` are sharded weights [V, D], or None; ranks are global."""

    first: Tensor | None
    last: Tensor | None
    first_rank: int
    last_rank: int
    group: ProcessGroup

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the last copy's gradient to the first copy's, and drop it; call this after backward, before the norm."""
        last = None if self.last is None else _gradient(self.last)
        if self.first is not None:
            first = _gradient(self.first)
            first.add_(self._move(last, torch.empty_like(first)))
        elif last is not None:
            self._move(last, None)
        if self.last is not None:
            self.last.grad = None

    @torch.no_grad()
    def copy_values(self) -> None:
        """Copy the values of the first copy to the last one. Call this after every change of the values."""
        if self.last is not None:
            here = None if self.first is None else local(self.first)
            local(self.last).copy_(self._move(here, torch.empty_like(local(self.last)), back=True))
        elif self.first is not None:
            self._move(local(self.first), None, back=True)

    def _move(self, source: Tensor | None, into: Tensor | None, back: bool = False) -> Tensor:
        """Transfer a tensor from the last part to the first, or with `back` from first to last; return it."""
        if source is not None and into is not None:
            return source
        sender, receiver = (self.first_rank, self.last_rank) if back else (self.last_rank, self.first_rank)
        if source is not None:
            dist.send(source.contiguous(), receiver, group=self.group)
            return source
        assert into is not None, "this rank holds neither copy of the embedding"
        dist.recv(into, sender, group=self.group)
        return into


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None, "both copies of the embedding get a gradient in every step"
    return local(weight.grad)


def tie_embeddings(parts: list[Transformer], stage_ranks: list[int], group: ProcessGroup) -> TiedEmbedding | None:
    """Return the tie of the copies, or None if this rank holds neither; `stage_ranks` are the stages' global ranks."""
    first = next((p.embedding.weight for p in parts if p.part.first), None)
    last = next((p.embedding.weight for p in parts if p.part.last and not p.part.first and p.mtp), None)
    heads = parts[0].config.num_mtp_heads
    if not heads or len(stage_ranks) == 1 or (first is None and last is None):
        return None
    return TiedEmbedding(first=first, last=last, first_rank=stage_ranks[0], last_rank=stage_ranks[-1], group=group)
