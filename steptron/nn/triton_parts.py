"""Parts that the package's Triton kernels share: reads and writes in fp32, marks of NaN, and sums over programs.

A kernel that sums over rows writes one row of partial results for each program; `over_programs` adds these up in their
order. So there are no atomics, and the same bits each time.

Maxima on a GPU ignore a NaN, sums do not: so a sum of marks tells whether a maximum has met one.

Importing this module requires Triton.

Legend: G programs, C columns of a partial result. In kernels the suffix is that of the tensor to which a pointer leads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from steptron.nn import triton_launch
from steptron.nn.triton_launch import blocks

BLOCK_G, BLOCK_C = 32, 32
"""Rows and columns of a tile of partial results."""


@triton.jit
def read(tensor, places, inside):
    """Return the values at these places in fp32; 0 outside."""
    return tl.load(tensor + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def write(tensor, places, values, inside):
    """Store the values at these places in the tensor's dtype."""
    tl.store(tensor + places, values.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(−x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def nan_mark(x):
    """Return NaN where x is NaN, else 0."""
    return tl.where(x == x, 0.0, float("nan"))


@triton.jit
def or_nan(x, mark):
    """Return x, or NaN where the mark is NaN."""
    return tl.where(mark == mark, x, mark)


@triton.jit
def _over_programs_kernel(partial_GC, found_C, count, width, num_sums, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
    peak = tl.full([BLOCK_G, BLOCK_C], float("-inf"), tl.float32)
    broken = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
    for start in range(0, count, BLOCK_G):
        rows = start + tl.arange(0, BLOCK_G)
        inside = (rows < count)[:, None] & (columns < width)[None, :]
        values = read(partial_GC, rows[:, None] * width + columns[None, :], inside)
        total += values
        peak = tl.maximum(peak, tl.where(inside, values, float("-inf")))
        broken += nan_mark(values)
    peaks = or_nan(tl.max(peak, axis=0), tl.sum(broken, axis=0))
    write(found_C, columns, tl.where(columns < num_sums, tl.sum(total, axis=0), peaks), columns < width)


def over_programs(partial_GC: Tensor, num_sums: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what the programs of a kernel found [C], in this dtype.

    It is the sums of the first `num_sums` columns of partial results (fp32), and the maxima of the others.
    """
    count, width = partial_GC.shape
    found_C, sizes = partial_GC.new_empty(width, dtype=dtype), {"BLOCK_G": BLOCK_G, "BLOCK_C": BLOCK_C}
    tensors = (partial_GC, found_C)
    triton_launch.launch(_over_programs_kernel, blocks(width, BLOCK_C), tensors, count, width, num_sums, **sizes)
    return found_C
