"""The interface of the experts' back ends: their inputs, their options and their result.

Legend: N tokens, K choices a token, P rows (padding included), D hidden, E experts, I expert FFN.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from steptron.moe.dispatch import Level
from steptron.moe.elementwise import TORCH, MoeKernels
from steptron.moe.stats import RowStats
from steptron.nn.recompute import Keep, keep


class Weights(NamedTuple):
    """The parameters of the experts."""

    gate_EID: Float[Tensor, "E I D"]
    up_EID: Float[Tensor, "E I D"]
    down_EDI: Float[Tensor, "E D I"]


class Options(NamedTuple):
    """The settings of one forward pass, given by the stage and the observer."""

    limit: float | None = None
    """Activation limit; None: off."""
    with_stats: bool = False
    """Set to compute statistics of each row."""
    keep_rows: Keep = keep
    """Calls the function that gathers the rows; replace it to recompute them in backward (see nn/recompute.py).

    The back end `blocks` always gathers again.
    """
    keep_product: Keep = keep
    """Calls the function that computes h; replace it to recompute h in backward."""
    kernels: MoeKernels = TORCH
    """The small operations. The back end `blocks` has its own."""


Compute = Callable[..., tuple[Tensor, RowStats | None]]
"""(x_ND, weights_NK, plan, weights, options) → (Σ_k weight · expert(x) [N, D], statistics of rows where asked for)."""


class Backend(NamedTuple):
    """A way to compute the experts. All back ends give the same result, up to rounding."""

    name: str
    """The name in the recipe (`kernels.experts`)."""
    compute: Compute
    """The function that computes the experts."""
    exact: bool
    """True if the number of rows must be known on the host, which makes the host wait for the accelerator."""
    fill_empty: bool = False
    """True if every expert needs rows: those without any get a group of padding."""
    level: Level | None = None
    """Enlarges groups of rows so that neighbouring experts share a batched product; None: groups keep their size."""
