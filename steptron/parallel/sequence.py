"""Gather and scatter of a sequence that is split over the ranks of a group.

    gather:  slices ─ all-gather ─► complete sequence                             backward: reduce-scatter
    scatter: partial sums of the complete sequence ─ reduce-scatter ─► slices     backward: all-gather

Shapes: B rows, T tokens, D hidden, R ranks; T is the second-to-last dim, * any leading dims.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from steptron.torch_internals import all_gather_single, reduce_scatter_single


def _gather(slice_: Tensor, group: ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    parts = slice_.new_empty(ranks, *slice_.shape)
    all_gather_single(parts.view(-1), slice_.contiguous().view(-1), group=group)
    return torch.cat(parts.unbind(0), dim=-2)


def _scatter(whole: Tensor, group: ProcessGroup) -> Tensor:
    parts = torch.stack(whole.chunk(dist.get_world_size(group), dim=-2))
    slice_ = torch.empty_like(parts[0])
    reduce_scatter_single(slice_.view(-1), parts.view(-1), group=group)
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
    """Gather [*, T / R, D] of each rank to [*, T, D] on all ranks; the gradient is summed over the ranks."""
    return _Gather.apply(slice_, group)  # pyright: ignore[reportReturnType]


def scatter_sequence(whole: Tensor, group: ProcessGroup) -> Tensor:
    """Sum [*, T, D] over the ranks and return this rank's slice of the sum, [*, T / R, D]."""
    return _Scatter.apply(whole, group)  # pyright: ignore[reportReturnType]
