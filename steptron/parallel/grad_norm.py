"""One exact gradient norm over all parameters, whatever meshes they live on, and the clip that goes with it.

Each rank sums the squares of its local shards (rows in fp32, their sum in fp64), divided by the number of ranks that hold the same
elements; one all-reduce over all ranks then counts every element of every parameter just once.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from steptron.nn.local import local


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """The global norm before clipping (scalar, float64); gradients are scaled in place to at most `max_norm`.

    `parameters`: those this rank holds, of any mesh; all ranks call it together, also those without a gradient.
    Ranks that do not hold a parameter at all add nothing for it, so views that split parameters (pp, ep) need no special case."""
    parameters = list(parameters)
    assert parameters, "every rank holds some part of the model"
    gradients = [p.grad for p in parameters if p.grad is not None]
    locals_ = [local(g) for g in gradients]
    copies = [_copies(g) for g in gradients]
    total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    if gradients:
        squares = torch.stack([_sum_of_squares(g) for g in locals_])
        total += (squares / torch.tensor(copies, dtype=torch.float64, device=total.device)).sum()
    dist.all_reduce(total)
    norm = total.sqrt()
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0).float()
    for gradient in locals_:
        gradient.mul_(scale)
    return norm


def _sum_of_squares(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dim=-1).double().square().sum()


def _copies(gradient: Tensor) -> int:
    """Ranks that hold the same elements as this one."""
    if not isinstance(gradient, DTensor):
        return dist.get_world_size()
    copies = 1
    for size, placement in zip(gradient.device_mesh.shape, gradient.placements, strict=True):
        assert not placement.is_partial(), f"a gradient still to be reduced: {placement}"
        copies *= size if isinstance(placement, Replicate) else 1
    return copies
