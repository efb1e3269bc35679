"""What the back ends of the experts have in common: what they are given, and what they return.

Legend: N tokens, K choices a token, P rows (padding included), D hidden, E experts, I expert FFN.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from steptron.moe.dispatch import Level
from steptron.moe.stats import RowStats
from steptron.nn.recompute import Keep, keep


class Weights(NamedTuple):
    """The parameters of the experts."""

    gate_EID: Float[Tensor, "E I D"]
    up_EID: Float[Tensor, "E I D"]
    down_EDI: Float[Tensor, "E D I"]


class Options(NamedTuple):
    """What the stage and the observer ask of one forward pass."""

    limit: float | None = None
    """Activation limit; None: off."""
    with_stats: bool = False
    """Whether the statistics of rows are wanted."""
    keep_rows: Keep = keep
    """Makes the gathered rows, which backward may compute again (see nn/recompute.py). Blocks always gather again."""
    keep_product: Keep = keep
    """Makes h, likewise."""


Compute = Callable[..., tuple[Tensor, RowStats | None]]
"""(x_ND, weights_NK, plan, weights, options) → (Σ_k weight · expert(x) [N, D], statistics of rows where asked for)."""


class Backend(NamedTuple):
    """A way to compute the experts. All ways give the same, to rounding."""

    name: str
    """As the recipe calls it."""
    compute: Compute
    """What does it."""
    exact: bool
    """Whether it must know the number of rows on the host; an accelerator is waited for then."""
    level: Level | None = None
    """Which groups it likes larger."""
