"""The statistics of the network that are recorded on this rank, at the recipe's level, and the observers that write
them.

    recipe, meshes, network ─► Surface ─► registry ─► Plane ◄── observers, hooks, sums over weights

Legend: P parameters of this rank.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from steptron.config.monitoring import MonitorConfig
from steptron.config.schema import moe_layers
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
"""The number of tokens of a document in the first position bucket. Each of the next buckets ends at twice the
position."""

log = logging.getLogger("steptron")


@dataclass(kw_only=True)
class Instruments:
    """The instruments on this rank's network."""

    plane: Plane
    """The values of this step. The observers on the network's modules write them."""
    parameters: list[str]
    """The names of the parameters, in the order in which `after_backward` gets their gradients."""
    experts: ExpertWeights | None = None
    """Writes the norms of experts' weights; None at the level `off`."""
    weights: AllWeights | None = None
    """Writes the norms of all parameters, at the level `full` only."""
    updates: UpdateObserver | None = None
    """Observes the updates of the optimizer, at the level `full` only."""

    def after_backward(self, squares_P: Tensor) -> None:
        """Write the statistics of parameters and gradients, after every backward pass. `squares_P`: Σ g² by
        parameter."""
        known = self.experts.see() if self.experts else {}
        if self.weights:
            self.weights.see(squares_P, known)


def watch_network(
    monitor: MonitorConfig, meshes: Meshes, network: Network, sources: Sequence[str], longest: int
) -> Instruments:
    """Put the observers of the recipe's level on the network, and return them with the plane that they write.

    Args:
        sources: the data sources.
        longest: the number of tokens of the longest sequence of all stages.
    """
    level, models, model = monitor.level, list(network.parts.values()), network.config
    surface = _surface(monitor, meshes, network, sources, longest)
    plane = Plane(full_registry(surface) if level == "full" else vital_registry(surface), network.device)
    instruments = Instruments(plane=plane, parameters=[name for name, _ in network.named_parameters()])
    if level == "off":
        return instruments
    parameters = dict(network.named_parameters())
    copies = {name: copies_of(p) for name, p in parameters.items()}
    columns = model.moe.ffn_size // meshes.layout.expert["etp"]
    watch_experts(models, plane, surface.experts_here, columns, full=level == "full")
    instruments.experts = ExpertWeights(models, plane, parameters, copies)
    if level == "full":
        batches = Batches()
        for part in models:
            batches.follow(part)
        watch_layers(models, plane, meshes.dense["tp"].get_local_rank())
        watch_losses(models, plane, batches, meshes.layout.dense["tp"])
        watch_modules(models, plane)
        instruments.updates = UpdateProbe(plane, copies)
        instruments.weights = AllWeights(models, plane, parameters, copies)
    return instruments


def not_finite(squares_P: Tensor) -> Tensor:
    """Return the number of this rank's gradients with an element that is NaN or infinite, as a scalar tensor."""
    return (~torch.isfinite(squares_P)).sum()


def _surface(monitor: MonitorConfig, meshes: Meshes, network: Network, sources: Sequence[str], longest: int) -> Surface:
    model, models = network.config, list(network.parts.values())
    per_rank = model.moe.num_experts // meshes.layout.expert["ep"]
    first = meshes.expert["ep"].get_local_rank() * per_rank
    return Surface(
        moe_layers=() if monitor.level == "off" else moe_layers(model),
        num_experts=model.moe.num_experts,
        world_size=meshes.layout.world_size,
        layers_here=list(dict.fromkeys(n for part in models for n in blocks_of(part))),
        moe_layers_here=list(network.moe_layers()),
        experts_here=range(first, first + per_rank),
        num_heads=max(model.full.num_heads, model.sliding.num_heads),
        parameters=[name for name, _ in network.named_parameters()],
        sources=sources,
        positions=position_buckets(longest),
        num_mtp_heads=model.num_mtp_heads,
        modules=_probed(monitor, models),
    )


def _probed(monitor: MonitorConfig, models: list[Transformer]) -> list[str]:
    """Return the modules here that the recipe names.

    Rank 0 warns of a pattern that matches no module on any rank, and of a level without probes.
    """
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


def position_buckets(longest: int) -> list[int]:
    """Return the starts of the position buckets below `longest`."""
    starts = [0]
    while (start := FIRST_BUCKET << (len(starts) - 1)) < longest:
        starts.append(start)
    return starts
