"""The sum of squares of each parameter's gradient, every element counted once over all ranks; clipping by the norm.

    local shards ─► Σ squares of each parameter ÷ ranks that hold the same elements ─► all-reduce ─► norm ─► clip

Squares are summed in fp32 along rows, and in fp64 over rows and parameters. Every element of every parameter counts
exactly once.

Legend: P parameters of this rank.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from steptron.nn.to_local import local


def gradient_squares(parameters: Iterable[Tensor]) -> Tensor:
    """Return Σ g² of each of this rank's parameters, float64 [P]; summed over all ranks, every element counts once.

    The step all-reduces them together with its other sums. A sum is 0 for a parameter without a gradient. Ranks that do
    not hold a parameter add nothing for it, so axes that split parameters between ranks (pp, ep) need no special case.
    """
    parameters = list(parameters)
    assert parameters, "every rank holds some part of the model"
    nothing = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    gradients = [p.grad for p in parameters]
    return torch.stack([nothing if g is None else _sum_of_squares(local(g)) / copies_of(g) for g in gradients])


def clip_gradients(parameters: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale the gradients in place so that their global norm, currently `norm`, is at most `max_norm`."""
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0).float()
    for p in parameters:
        if p.grad is not None:
            local(p.grad).mul_(scale)


def copies_of(tensor: Tensor) -> int:
    """Return the number of ranks that hold the same elements as this one."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    copies = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        assert not placement.is_partial(), f"a gradient must be reduced before its norm is taken, not {placement}"
        copies *= size if isinstance(placement, Replicate) else 1
    return copies


def _sum_of_squares(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dim=-1).double().square().sum()
