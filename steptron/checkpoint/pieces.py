"""What this rank holds of the run's tensors, taken out of training's hands.

tensors, plain or sharded ─ Staging.copy, into host memory that is kept for the next time ─► pieces ─► save.py, while training goes on
                          └ piece: the values themselves, where training waits for the save
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Size, Tensor

from steptron.nn.local import local
from steptron.nn.rectangles import Rectangle, rectangle


class Piece(NamedTuple):
    """This rank's part of a tensor."""

    values: Tensor
    """Its elements, a plain tensor."""
    rectangle: Rectangle
    """Where they lie in the whole."""
    shape: Size
    """Of the whole."""


def piece(tensor: Tensor) -> Piece:
    """This rank's part, sharing its memory."""
    part = rectangle(tensor)
    values = local(tensor).detach()
    # FSDP2 gives a rank without elements an empty tensor of no particular shape.
    assert part.elements == 0 or part.size == tuple(values.shape), f"a rank holds {tuple(values.shape)}, not its {part}"
    return Piece(values, part, tensor.shape)


def pieces_of(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """This rank's part of each, sharing its memory."""
    return {name: piece(tensor) for name, tensor in tensors.items()}


class Staging:
    """Host memory for one copy of this rank's tensors; page-locked where they are on a GPU."""

    def __init__(self):
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
        """Copies that training does not change; the next call does. Returns when all values are there."""
        pieces = pieces_of(tensors)
        for name, (values, _, _) in pieces.items():
            if name not in self._buffers:
                self._buffers[name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._buffers[name].copy_(values, non_blocking=True)
        if any(values.is_cuda for values, _, _ in pieces.values()):
            torch.cuda.current_stream().synchronize()
        return {name: found._replace(values=self._buffers[name]) for name, found in pieces.items()}
