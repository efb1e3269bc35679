"""Which tokens of a batch are one document. Built once a batch on the host, read by every attention layer.

    documents_BT ──► Packing.from_documents ──► positions_BT (for RoPE) · cu_seqlens (for attention kernels)

A document is a run of equal ids inside a row; a row's end always ends a document. So documents are contiguous among the B·T
flattened tokens, and `cu_seqlens` says it all: document i is the tokens from cu_seqlens[i] up to cu_seqlens[i + 1].

Shapes: B rows, T tokens a row, N = B·T, S documents.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """Document borders of a batch."""

    documents_BT: Int[Tensor, "B T"]
    """Document id by token."""
    positions_BT: Int[Tensor, "B T"]
    """Position in the document, from 0."""
    cu_seqlens: tuple[int, ...]
    """First token of each document among the flattened ones, then N."""
    cu_seqlens_S: Int[Tensor, "S_plus_1"]
    """The same as int32 on the batch's device."""

    @classmethod
    def from_documents(cls, documents_BT: Int[Tensor, "B T"]) -> "Packing":
        """From document ids on the CPU; to(device) moves the result."""
        assert documents_BT.device.type == "cpu", "Packing reads ids on the host: build it before moving the batch"
        starts_BT = torch.ones_like(documents_BT, dtype=torch.bool)
        torch.ne(documents_BT[:, 1:], documents_BT[:, :-1], out=starts_BT[:, 1:])
        tokens_N = torch.arange(documents_BT.numel())
        starts_S = tokens_N[starts_BT.flatten()]
        cu_seqlens_S = torch.cat([starts_S, torch.tensor([documents_BT.numel()])])
        positions_N = tokens_N - torch.repeat_interleave(starts_S, cu_seqlens_S.diff())
        return cls(
            documents_BT=documents_BT,
            positions_BT=positions_N.view_as(documents_BT),
            cu_seqlens=tuple(cu_seqlens_S.tolist()),
            cu_seqlens_S=cu_seqlens_S.int(),
        )

    def to(self, device: torch.device | str) -> "Packing":
        """The same with its tensors on `device`."""
        return replace(
            self,
            documents_BT=self.documents_BT.to(device),
            positions_BT=self.positions_BT.to(device),
            cu_seqlens_S=self.cu_seqlens_S.to(device),
        )

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(stop - start for start, stop in pairwise(self.cu_seqlens))
