"""Keep a pipeline's copies of the embedding equal: gradients of later copies go to the first, new values come back.

    backward: gradients of the copies of later stages ─► added to that of the first stage
    optimizer step on the first stage's copy alone (it is the one in checkpoints and in the gradient norm)
    afterwards: its values ─► the later copies

Each stage with a block of an MTP head has a copy. All copies are sharded in the same way. So each rank exchanges only
its shard, with the corresponding rank of the other stage; if one rank has both stages, it exchanges nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from steptron.model.parts import Part
from steptron.model.transformer import Transformer
from steptron.nn.to_local import local


@dataclass(frozen=True, kw_only=True)
class Copy:
    """The copy of a later stage."""

    rank: int
    """The global rank of the stage."""
    least_heads: int
    """The number of MTP heads from which on the stage reads its copy."""
    weight: Tensor | None
    """The sharded weight [V, D] if the stage is on this rank."""


@dataclass(frozen=True, kw_only=True)
class TiedEmbedding:
    """The copies of a pipeline, with those weights that are on this rank; ranks are global."""

    first: Tensor | None
    first_rank: int
    copies: Sequence[Copy]
    group: ProcessGroup

    @torch.no_grad()
    def add_gradients(self, trained: int) -> None:
        """Add the later copies' gradients to the first one's, and drop them. Call this after backward, before the norm.

        `trained` is the number of MTP heads that have run.
        """
        for copy in self.copies:
            if copy.least_heads > trained:
                continue
            gradient = None if copy.weight is None else _gradient(copy.weight)
            if self.first is not None:
                first = _gradient(self.first)
                first.add_(self._move(gradient, torch.empty_like(first), copy.rank, self.first_rank))
            elif gradient is not None:
                self._move(gradient, None, copy.rank, self.first_rank)
            if copy.weight is not None:
                copy.weight.grad = None

    @torch.no_grad()
    def copy_values(self) -> None:
        """Copy the values of the first copy to the later ones. Call this after every change of the values."""
        here = None if self.first is None else local(self.first)
        for copy in self.copies:
            if copy.weight is not None:
                into = torch.empty_like(local(copy.weight))
                local(copy.weight).copy_(self._move(here, into, self.first_rank, copy.rank))
            elif here is not None:
                self._move(here, None, self.first_rank, copy.rank)

    def _move(self, source: Tensor | None, into: Tensor | None, sender: int, receiver: int) -> Tensor:
        """Transfer a tensor from one rank to another, unless both are this one; return it."""
        if source is not None and into is not None:
            return source
        if source is not None:
            dist.send(source.contiguous(), receiver, group=self.group)
            return source
        assert into is not None, "this rank holds neither copy of the embedding"
        dist.recv(into, sender, group=self.group)
        return into


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None, "a copy of the embedding that is read gets a gradient in every step"
    return local(weight.grad)


def tie_embeddings(
    parts: Mapping[int, Transformer], cuts: list[Part], stage_ranks: list[int], group: ProcessGroup
) -> TiedEmbedding | None:
    """Return the tie of the copies, or None if this rank holds none or there is only one.

    `parts` are this rank's stages by number, `cuts` all stages, and `stage_ranks` their global ranks.
    """
    weights = {stage: part.embedding.weight for stage, part in parts.items() if part.part.first or part.part.blocks}
    later = {stage: min(part.blocks) for stage, part in enumerate(cuts) if part.blocks and not part.first}
    if not weights or not later:
        return None
    copies = [
        Copy(rank=stage_ranks[stage], least_heads=head, weight=weights.get(stage)) for stage, head in later.items()
    ]
    return TiedEmbedding(first=weights.get(0), first_rank=stage_ranks[0], copies=copies, group=group)
