"""The document borders of a packed batch. Built once per batch on the host, and read by every attention layer.

    documents_BW ──► Packing.from_documents ──► positions_BT (for RoPE) · cu_seqlens (for attention kernels)

A document is a run of equal ids within a row; the end of a row always ends a document. So documents are contiguous
among the B·W flattened tokens, and `cu_seqlens` describes them completely: document i is the tokens from cu_seqlens[i]
to cu_seqlens[i + 1].

Under context parallelism, a rank computes on only some pieces of each row. It reads the complete rows nevertheless, so
that it knows every border without communication; `pieces` gives the ranges of a row that it holds.

Shapes: B rows, W tokens of a complete row, T of them on this rank, S documents.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from steptron.nn.to_device import to_device


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """Document borders of a batch."""

    positions_BT: Int[Tensor, "B T"]
    """Position of each of this rank's tokens in its document, counted from 0."""
    pieces: tuple[tuple[int, int], ...]
    """This rank's tokens of a row: ranges [start, stop) of the complete row, in the order in which they are stored."""
    row_length: int
    """Tokens of a complete row, W."""
    cu_seqlens: tuple[int, ...]
    """First token of each document among the flattened tokens of the complete rows, then B·W."""
    cu_seqlens_S: Int[Tensor, "S_plus_1"]
    """`cu_seqlens` as int32 on the batch's device."""

    @classmethod
    def from_documents(
        cls, documents_BW: Int[Tensor, "B W"], pieces: tuple[tuple[int, int], ...] | None = None
    ) -> "Packing":
        """Build the packing from the document ids of complete rows, which must be on the CPU.

        `to(device)` moves the result. If `pieces` is None, this rank holds all tokens.
        """
        assert documents_BW.device.type == "cpu", "Packing reads ids on the host: build it before moving the batch"
        pieces = pieces or ((0, documents_BW.shape[1]),)
        starts_BW = torch.ones_like(documents_BW, dtype=torch.bool)
        torch.ne(documents_BW[:, 1:], documents_BW[:, :-1], out=starts_BW[:, 1:])
        tokens_N = torch.arange(documents_BW.numel())
        starts_S = tokens_N[starts_BW.flatten()]
        cu_seqlens_S = torch.cat([starts_S, torch.tensor([documents_BW.numel()])])
        positions_N = tokens_N - torch.repeat_interleave(starts_S, cu_seqlens_S.diff())
        positions_BW = positions_N.view_as(documents_BW)
        return cls(
            positions_BT=torch.cat([positions_BW[:, start:stop] for start, stop in pieces], dim=1),
            pieces=pieces,
            row_length=documents_BW.shape[1],
            cu_seqlens=tuple(cu_seqlens_S.tolist()),
            cu_seqlens_S=cu_seqlens_S.int(),
        )

    def to(self, device: torch.device | str) -> "Packing":
        """Return a copy with its tensors on `device`."""
        positions_BT, cu_seqlens_S = to_device(self.positions_BT, device), to_device(self.cu_seqlens_S, device)
        return replace(self, positions_BT=positions_BT, cu_seqlens_S=cu_seqlens_S)

    @property
    def rows(self) -> int:
        """Number of rows of the batch, B."""
        return self.positions_BT.shape[0]

    @cached_property
    def longest(self) -> int:
        """Number of tokens of the longest document."""
        return max(stop - start for start, stop in pairwise(self.cu_seqlens))
