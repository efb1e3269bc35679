"""The memory that routed experts keep for the backward pass: a lower bound by counting rows, without running the
network.

    rows of a layer and micro-batch × what a row keeps × layers of a pipeline stage × micro-batches in flight

Attention, norms, shared experts and the loss come on top.
"""

from typing import NamedTuple

from steptron.config.schema import Recipe, StageConfig, moe_layers
from steptron.parallel.mesh import Layout

BYTES = {"fp32": 4, "bf16": 2}
"""The bytes of a value in each precision."""


class ExpertActivations(NamedTuple):
    """The largest of a run's stages."""

    stage: str
    """The stage's name."""
    rows: int
    """The rows of a layer's experts per rank and micro-batch."""
    bytes: int
    """The bytes that the experts of a rank keep until the backward pass."""


def expert_activations(recipe: Recipe, layout: Layout, cuda: bool) -> ExpertActivations:
    """Return the least that the experts of a rank of the first pipeline stage keep, of the stage that keeps most."""
    found = []
    for name, stage in recipe.stages.items():
        rows = expert_rows(recipe, stage, layout, cuda)
        found.append(ExpertActivations(name, rows, int(rows * _bytes_by_row(recipe, stage, layout))))
    return max(found, key=lambda one: one.bytes)


def expert_rows(recipe: Recipe, stage: StageConfig, layout: Layout, cuda: bool) -> int:
    """Return the rows that the experts of a rank get in one layer from one micro-batch, if the load is even.

    A CPU counts them. On CUDA buffers have room for all choices of every token that arrives, wherever its experts are;
    of E experts over ep ranks, a token with K choices has none on a rank with a probability of (1 − 1 / ep)^K."""
    sharing = layout.dense["cp"] * layout.dense["tp"]
    tokens, ep, top_k = stage.micro_batch * stage.seq_len // sharing, layout.expert["ep"], recipe.model.moe.top_k
    if not cuda or ep == 1:
        return tokens * top_k * layout.expert["etp"]
    reached = 1.0 if recipe.parallel.ep_dispatch == "all_gather" else 1 - (1 - 1 / ep) ** top_k
    return int(tokens * ep * layout.expert["etp"] * reached) * top_k


def _bytes_by_row(recipe: Recipe, stage: StageConfig, layout: Layout) -> float:
    """Return the bytes that a row keeps, over the layers of a pipeline stage and the micro-batches in flight there."""
    model, recompute, pp = recipe.model, recipe.parallel.recompute, layout.dense["pp"]
    keeping = {part: 1 - 1 / recompute.every if part in recompute.parts else 1.0 for part in ("ffn", "permutation")}
    columns = 2 * model.moe.ffn_size // layout.expert["etp"]  # the results of the gate and up projections
    values = (columns + model.hidden_size * keeping["permutation"]) * keeping["ffn"]
    layers = len(moe_layers(model)) // pp  # no even cut has fewer
    micro_batches = stage.batch_size // (stage.micro_batch * layout.data_ranks)
    return values * BYTES[recipe.precision] * layers * max(1, min(pp, micro_batches))
