"""A sequence that is split over the ranks of a group, and the ways between its slices and the whole.

    gather:  slices ─ all-gather ─► whole            backward: reduce-scatter
    scatter: partial sums of the whole ─ reduce-scatter ─► slices      backward: all-gather

Shapes: B rows, T tokens, D hidden, R ranks; T is the last dim but one, * any leading dims.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def _gather(slice_: Tensor, group: ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    parts = slice_.new_empty(ranks, *slice_.shape)
    dist.all_gather_single(parts.view(-1), slice_.contiguous().view(-1), group=group)
    return torch.cat(parts.unbind(0), dim=-2)


def _scatter(whole: Tensor, group: ProcessGroup) -> Tensor:
    parts = torch.stack(whole.chunk(dist.get_world_size(group), dim=-2))
    slice_ = torch.empty_like(parts[0])
    dist.reduce_scatter_single(slice_.view(-1), parts.view(-1), group=group)
    return slice_


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slice_: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(slice_, group)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return _scatter(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter(whole, group)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return _gather(grads[0], ctx.group), None


def gather_sequence(slice_: Tensor, group: ProcessGroup) -> Tensor:
    """[*, T / R, D] on each rank → [*, T, D] on all; gradients of the whole are summed over the ranks."""
    return _Gather.apply(slice_, group)  # pyright: ignore[reportReturnType]


def scatter_sequence(whole: Tensor, group: ProcessGroup) -> Tensor:
    """[*, T, D], a term of a sum on each rank → [*, T / R, D], the rank's slice of the sum."""
    return _Scatter.apply(whole, group)  # pyright: ignore[reportReturnType]
