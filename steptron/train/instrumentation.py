"""Which statistics of the network are watched on this rank, at the recipe's level, and what writes them.

recipe, meshes, network ─► Surface ─► registry ─► Plane ◄── observers, hooks, sums over weights
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from steptron.config.monitoring import MonitorConfig
from steptron.config.schema import Recipe, moe_layers
from steptron.model.transformer import Transformer
from steptron.monitor.statistics.plane import Plane, Surface, full_registry, vital_registry
from steptron.monitor.statistics.probes import (
    Batches,
    UpdateProbe,
    blocks_of,
    matching,
    warn_of_patterns,
    watch_experts,
    watch_layers,
    watch_losses,
    watch_modules,
)
from steptron.monitor.statistics.weights import AllWeights, ExpertWeights
from steptron.optim.observe import UpdateObserver
from steptron.parallel.grad_norm import copies_of
from steptron.parallel.mesh import Meshes
from steptron.parallel.network import Network

FIRST_BUCKET = 16
"""Tokens of a document in the first position bucket; each of the next ones ends at twice the position."""

log = logging.getLogger("steptron")


@dataclass(kw_only=True)
class Seen:
    """What is watched of this rank's network."""

    plane: Plane
    """Written by the observers that hang on its modules."""
    parameters: list[str]
    """Names, in the order in which `after_backward` gets their gradients."""
    experts: ExpertWeights | None = None
    weights: AllWeights | None = None
    """What writes norms of weights: of experts from level `light` on, of all parameters at `full`."""
    updates: UpdateObserver | None = None
    """To be hung on the optimizer."""

    def after_backward(self, squares_P: Tensor) -> None:
        """Write what is seen of parameters and of their gradients, of which `squares_P` are Σ g². Called after every backward pass."""
        known = self.experts.see() if self.experts else {}
        if self.weights:
            self.weights.see(squares_P, known)


def watch_network(recipe: Recipe, meshes: Meshes, network: Network, sources: Sequence[str]) -> Seen:
    """The plane of this rank, with all the observers of its modules hung on."""
    level, models = recipe.monitor.level, list(network.parts.values())
    surface = _surface(recipe, meshes, network, sources)
    plane = Plane(full_registry(surface) if level == "full" else vital_registry(surface), network.device)
    seen = Seen(plane=plane, parameters=[name for name, _ in network.named_parameters()])
    if level == "off":
        return seen
    parameters = dict(network.named_parameters())
    copies = {name: copies_of(p) for name, p in parameters.items()}
    columns = recipe.model.moe.ffn_size // meshes.layout.expert["etp"]
    watch_experts(models, plane, surface.experts_here, columns, full=level == "full")
    seen.experts = ExpertWeights(models, plane, parameters, copies)
    if level == "full":
        batches = Batches()
        for model in models:
            batches.follow(model)
        watch_layers(models, plane, meshes.dense["tp"].get_local_rank())
        watch_losses(models, plane, batches, meshes.layout.dense["tp"])
        watch_modules(models, plane)
        seen.updates = UpdateProbe(plane, copies)
        seen.weights = AllWeights(models, plane, parameters, copies)
    return seen


def not_finite(squares_P: Tensor) -> Tensor:
    """How many of this rank's gradients have an element that is NaN or infinite; a scalar."""
    return (~torch.isfinite(squares_P)).sum()


def _surface(recipe: Recipe, meshes: Meshes, network: Network, sources: Sequence[str]) -> Surface:
    model, models = recipe.model, list(network.parts.values())
    per_rank = model.moe.num_experts // meshes.layout.expert["ep"]
    first = meshes.expert["ep"].get_local_rank() * per_rank
    longest = max(stage.seq_len for stage in recipe.stages.values())
    return Surface(
        moe_layers=() if recipe.monitor.level == "off" else moe_layers(model),
        num_experts=model.moe.num_experts,
        world_size=meshes.layout.world_size,
        layers_here=[n for part in models for n in blocks_of(part)],
        moe_layers_here=list(network.moe_layers()),
        experts_here=range(first, first + per_rank),
        num_heads=max(model.full.num_heads, model.sliding.num_heads),
        parameters=[name for name, _ in network.named_parameters()],
        sources=sources,
        positions=_buckets(longest),
        num_mtp_heads=model.num_mtp_heads,
        modules=_probed(recipe.monitor, models),
    )


def _probed(monitor: MonitorConfig, models: list[Transformer]) -> list[str]:
    """Modules here that the recipe names. The first rank warns of a pattern that means none on any rank, and of a level without probes."""
    patterns = monitor.probes
    if monitor.level != "full":
        if patterns and dist.get_rank() == 0:
            log.warning(
                "monitor.probes=[%s] with monitor.level=%s: no module is watched; probes need monitor.level=full",
                *(",".join(patterns), monitor.level),
            )
        return []
    names, without = matching(patterns, models)
    if patterns:
        missed: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(missed, without)
        if dist.get_rank() == 0:
            warn_of_patterns([p for p in without if all(p in other for other in missed)], models)
    return names


def _buckets(longest: int) -> list[int]:
    """Starts of the position buckets below `longest`."""
    starts = [0]
    while (start := FIRST_BUCKET << (len(starts) - 1)) < longest:
        starts.append(start)
    return starts
