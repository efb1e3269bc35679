"""What a pass over the experts' activations leaves behind for the metrics.

Legend: P rows, I expert FFN.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class SwigluRows(NamedTuple):
    """Statistics of the clipped SwiGLU, row by row, in fp32; no gradient passes through them.

    act = silu(gate) and lin = up, both after clipping. Rows that are nobody's hold anything, NaN too: select before you sum."""

    h_square: Float[Tensor, "P"]
    """Σ_I (act · lin)², without the row's weight."""
    gate_up: Float[Tensor, "P"]
    """Σ_I gate · up, before SiLU and clipping."""
    gate_square: Float[Tensor, "P"]
    """Σ_I gate²."""
    up_square: Float[Tensor, "P"]
    """Σ_I up²."""
    peak_gate: Float[Tensor, "P"]
    """max_I silu(gate) before clipping; below 0 where no gate is positive."""
    peak_up: Float[Tensor, "P"]
    """max_I |up| before clipping."""
    clipped: Float[Tensor, "P"]
    """Elements with silu(gate) > limit plus those with |up| > limit: 0 to 2·I; 0 without a limit."""
