"""The launch of Triton kernels, and the shape of their tiles. Nothing here needs Triton.

Callers write `triton_launch.launch(…)`, so that a counter of kernels has one function to replace.
"""

from typing import Any

from torch import Tensor

PROGRAMS = 256
"""The most programs of a kernel that sums over rows: each writes one row of partial sums. The number depends on the
size of the tensors alone, so that sums have the same order on every device."""


def launch(kernel: Any, programs: int, tensors: tuple[Tensor | None, ...], *numbers: float, **constants: Any) -> None:
    """Run a kernel of this many programs on these tensors. Without programs, nothing is compiled or launched."""
    if programs:
        kernel[(programs,)](*tensors, *numbers, **constants)


def blocks(count: int, size: int) -> int:
    """Return how many blocks of this size `count` elements need."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least `count`, and at least 1."""
    return 1 << max(count - 1, 0).bit_length()


def block_of_rows(width: int, elements: int) -> int:
    """Return how many rows of `width` elements, a power of two, a tile of about `elements` holds: at least 1."""
    return max(1, elements // power_of_two(width))


def warps(elements: int) -> int:
    """Return the warps of a program with a tile of this many elements: 16 elements for a thread, at most 16 warps."""
    return min(max(power_of_two(elements) // 512, 1), 16)


def shares(count: int, size: int) -> tuple[int, int]:
    """Return how many programs share `count` rows in blocks of `size`, and the rows of each: a multiple of `size`."""
    each = blocks(blocks(count, size), PROGRAMS) * size
    return (blocks(count, each), each) if count else (0, 0)
