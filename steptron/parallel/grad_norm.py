"""One exact gradient norm over all parameters, whatever meshes they live on, and the clip that goes with it.

    local shards ─► Σ squares by parameter ÷ ranks that hold the same elements ─► all-reduce (with the step's other sums) ─► norm ─► clip

Rows are squared and summed in fp32, rows and parameters in fp64; every element of every parameter counts just once.

Legend: P parameters of this rank.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from steptron.nn.to_local import local


def gradient_squares(parameters: Iterable[Tensor]) -> Tensor:
    """Σ g² of each of this rank's parameters, float64 [P], so that summed over all ranks every element counts once.

    0 where there is no gradient. Ranks that do not hold a parameter at all add nothing for it, so views that split parameters (pp, ep)
    need no special case."""
    parameters = list(parameters)
    assert parameters, "every rank holds some part of the model"
    nothing = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    gradients = [p.grad for p in parameters]
    return torch.stack([nothing if g is None else _sum_of_squares(local(g)) / copies_of(g) for g in gradients])


def clip_gradients(parameters: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their global norm, which is `norm` now, is at most `max_norm`."""
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0).float()
    for p in parameters:
        if p.grad is not None:
            local(p.grad).mul_(scale)


def copies_of(tensor: Tensor) -> int:
    """Ranks that hold the same elements as this one."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    copies = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        assert not placement.is_partial(), f"a gradient still to be reduced: {placement}"
        copies *= size if isinstance(placement, Replicate) else 1
    return copies


def _sum_of_squares(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dim=-1).double().square().sum()
