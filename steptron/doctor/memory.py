"""The memory that a rank's share of the network takes during training, from the recipe and the layout alone.

pipeline stages of a rank ─► parameters and optimizer state on the meta device ─► ÷ the ranks that share each
"""

from typing import NamedTuple

import torch

from steptron.config.schema import Recipe
from steptron.model.transformer import Part, Transformer
from steptron.optim.optimizer import build_optimizer
from steptron.parallel.mesh import Layout
from steptron.parallel.pipeline_split import cut, ranks_of_stages


class RankMemory(NamedTuple):
    """The bytes that a rank keeps. Activations, gathered copies and the allocator's rest come on top."""

    weights: int
    """The bytes of parameters and router biases."""
    gradients: int
    """The bytes of gradients, which are reduced in fp32."""
    optimizer: int
    """The bytes of the optimizer's state."""


def rank_memory(recipe: Recipe, layout: Layout) -> RankMemory:
    """Return the memory of the rank that keeps most, under `engine: native`."""
    parallel, pp = recipe.parallel, layout.dense["pp"]
    main = max(recipe.stages.values(), key=lambda stage: stage.tokens)
    held = [RankMemory(0, 0, 0)] * pp
    parts = cut(recipe.model, parallel.pipeline, pp, main.seq_len)
    for owner, part in zip(ranks_of_stages(parallel.pipeline, pp), parts, strict=True):
        more = _part_memory(recipe, layout, part)
        held[owner] = RankMemory(*(a + b for a, b in zip(held[owner], more, strict=True)))
    return max(held, key=sum)


def _part_memory(recipe: Recipe, layout: Layout, part: Part) -> RankMemory:
    dense, expert = layout.dense, layout.expert
    with torch.device("meta"):
        model = Transformer(recipe.model, part)
        parameters = dict(model.named_parameters())
        state = build_optimizer(parameters, recipe.optim).state()

    def share(name: str, tensor: torch.Tensor) -> int:
        """Return the bytes of a rank's piece."""
        of_dense, of_expert = dense["dp_shard"] * dense["cp"] * dense["tp"], expert["edp_shard"] * expert["ep"]
        ranks = of_expert * expert["etp"] if ".experts." in name else of_dense
        return -(-tensor.numel() * tensor.itemsize // ranks)

    weights = sum(share(name, tensor) for name, tensor in parameters.items())
    biases = sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())
    return RankMemory(weights + biases, weights, sum(share(name, tensor) for name, tensor in state.items()))
