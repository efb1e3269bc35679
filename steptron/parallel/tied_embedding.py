"""One embedding, used at both ends of a pipeline: MTP heads, in the last part, read what the first part reads.

    backward: gradient of the last part's copy ─► added to the first part's
    optimizer step on the first part's alone (it is the one in checkpoints and in the gradient norm)
    afterwards: its values ─► the last part's copy

Both copies are sharded alike, so that each rank exchanges just its shard with the rank of the same place in the other stage: this
rank itself where the two parts share it, as in a V-shaped schedule.
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
    """The ends that this rank holds: `first` and `last` are weights [V, D], sharded; ranks are global ones."""

    first: Tensor | None
    last: Tensor | None
    first_rank: int
    last_rank: int
    group: ProcessGroup

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the last part's gradient to the first part's, and drop it. After backward, before the norm."""
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
        """Give the first part's values to the last part. After every change of them."""
        if self.last is not None:
            here = None if self.first is None else local(self.first)
            local(self.last).copy_(self._move(here, torch.empty_like(local(self.last)), back=True))
        elif self.first is not None:
            self._move(local(self.first), None, back=True)

    def _move(self, source: Tensor | None, into: Tensor | None, back: bool = False) -> Tensor:
        """What the other end has: from last to first, or `back`."""
        if source is not None and into is not None:
            return source
        sender, receiver = (self.first_rank, self.last_rank) if back else (self.last_rank, self.first_rank)
        if source is not None:
            dist.send(source.contiguous(), receiver, group=self.group)
            return source
        assert into is not None, "a rank with neither end has no part in it"
        dist.recv(into, sender, group=self.group)
        return into


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None, "both ends of a pipeline with MTP heads use the embedding in every step"
    return local(weight.grad)


def tie_embeddings(parts: list[Transformer], stage_ranks: list[int], group: ProcessGroup) -> TiedEmbedding | None:
    """The tie, as far as this rank holds an end of it. `stage_ranks`: global rank, in this pipeline, of each stage."""
    first = next((p.embedding.weight for p in parts if p.part.first), None)
    last = next((p.embedding.weight for p in parts if p.part.last and not p.part.first and p.mtp), None)
    heads = parts[0].config.num_mtp_heads
    if not heads or len(stage_ranks) == 1 or (first is None and last is None):
        return None
    return TiedEmbedding(first=first, last=last, first_rank=stage_ranks[0], last_rank=stage_ranks[-1], group=group)
