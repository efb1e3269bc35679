"""This rank's part of the run's tensors, copied so that training can change the originals.

tensors ─ Staging.copy: into host memory that is kept ─► pieces ─► save.py, while training continues
        └ piece: the values themselves, if training waits for the save
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Size, Tensor

from steptron.nn.shard_geometry import Rectangle, rectangle
from steptron.nn.to_local import local


class TensorPart(NamedTuple):
    """This rank's part of a tensor."""

    values: Tensor
    """The elements, as a plain tensor."""
    rectangle: Rectangle
    """The place of the elements in the whole tensor."""
    shape: Size
    """The shape of the whole tensor."""


def piece(tensor: Tensor) -> TensorPart:
    """Return this rank's part of a tensor. It shares the tensor's memory."""
    part = rectangle(tensor)
    values = local(tensor).detach()
    # FSDP2 gives a rank without elements an empty tensor of no particular shape.
    assert part.elements == 0 or part.size == tuple(values.shape), f"a rank holds {tuple(values.shape)}, not its {part}"
    return TensorPart(values, part, tensor.shape)


def pieces_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorPart]:
    """Return this rank's part of each tensor. The parts share the tensors' memory."""
    return {name: piece(tensor) for name, tensor in tensors.items()}


class Staging:
    """Host memory for one copy of this rank's tensors. It is page-locked if they are on a GPU."""

    def __init__(self):
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, TensorPart]:
        """Return copies that training does not change, once all values are there. The next call overwrites them."""
        pieces = pieces_of(tensors)
        for name, (values, _, _) in pieces.items():
            if name not in self._buffers:
                self._buffers[name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._buffers[name].copy_(values, non_blocking=True)
        if any(values.is_cuda for values, _, _ in pieces.values()):
            torch.cuda.current_stream().synchronize()
        return {name: found._replace(values=self._buffers[name]) for name, found in pieces.items()}
