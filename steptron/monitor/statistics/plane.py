"""The metrics plane on the device: one flat float32 tensor per rank, filled by observers and hooks without host waits.

    Surface (facts of the model) ─► Registry ─► Plane ── add, raise ──► values ─► vital front: summed over ranks, judged
                                                                           └────► the rest: copied to the host

Legend: L layers, E experts, S statistics that follow each other on one grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steptron.monitor.statistics.reduced_stats import register_vitals
from steptron.monitor.statistics.reduction import RULES
from steptron.monitor.statistics.registry import Registry

SWIGLU_SUMS = ("gate_up_sum", "gate_square_sum", "up_square_sum", "clipped_sum")
EXPERT_PEAKS = ("peak_gate", "peak_up")
LAYER_SUMS = ("shared_clipped_sum", "routed_norm_sum", "shared_norm_sum")
LAYER_PEAKS = ("logit_max", "shared_peak_gate", "shared_peak_up")
HEAD_SUMS = ("gate_sum", "gate_tokens", "attention_entropy_sum", "attention_samples")
RESIDUAL_SUMS = ("residual_square_sum", "residual_elements")
GAIN_SUMS = ("q_gain_square_sum", "k_gain_square_sum", "gain_elements")
UPDATE_SUMS = ("update_square_sum", "orthogonality_square_sum", "matrices")


@dataclass(frozen=True, kw_only=True)
class Surface:
    """The axes of the grids, both for this rank's part of the network and for all of it."""

    moe_layers: Sequence[int]
    """The global indices of the network's MoE layers."""
    num_experts: int
    """The number of routed experts per layer."""
    world_size: int
    """The number of ranks."""
    layers_here: Sequence[int]
    """Layers of which this rank has the attention or the FFN, by global index.

    The blocks of MTP heads are numbered after those of the backbone.
    """
    moe_layers_here: Sequence[int]
    """The layers among these that have experts."""
    experts_here: range
    """The experts that this rank computes."""
    num_heads: int
    """The largest number of query heads of a layer."""
    parameters: Sequence[str]
    """The names of the parameters of which this rank holds a part."""
    sources: Sequence[str]
    """The data sources."""
    positions: Sequence[int]
    """The first position of each bucket. A bucket ends where the next one starts."""
    num_mtp_heads: int
    """The number of MTP heads."""
    modules: Sequence[str]
    """The modules on this rank for which the recipe asks for statistics."""


def vital_registry(surface: Surface) -> Registry:
    """Return the registry of the vital statistics only, which detectors need."""
    registry = Registry()
    register_vitals(registry, surface.moe_layers, surface.num_experts, surface.world_size)
    return registry


def full_registry(surface: Surface) -> Registry:
    """Return the registry of all statistics."""
    registry = vital_registry(surface)
    _register_experts(registry, surface)
    _register_layers(registry, surface)
    _register_modules(registry, surface)
    _register_parameters(registry, surface)
    _register_losses(registry, surface)
    return registry


def _add_all(registry: Registry, names: Sequence[str], unit: str, axes: Mapping, peaks: bool = False) -> None:
    for name in names:
        registry.add(name, unit=unit, reduction="max" if peaks else "sum", axes=axes)


def _register_experts(registry: Registry, surface: Surface) -> None:
    if not surface.moe_layers_here:
        return
    by_layer = {"layer": surface.moe_layers_here}
    here = by_layer | {"expert": surface.experts_here}
    _add_all(registry, SWIGLU_SUMS, "1", here)
    _add_all(registry, EXPERT_PEAKS, "1", here, peaks=True)
    registry.derive("alignment", unit="1", powers={"gate_up_sum": 1, "gate_square_sum": -0.5, "up_square_sum": -0.5})
    registry.add("mass_sum", unit="tokens", reduction="sum", axes=by_layer | {"expert": range(surface.num_experts)})
    _add_all(registry, LAYER_SUMS, "1", by_layer)
    _add_all(registry, LAYER_PEAKS, "1", by_layer, peaks=True)
    registry.derive("routed_over_shared", unit="1", powers={"routed_norm_sum": 1, "shared_norm_sum": -1})


def _register_layers(registry: Registry, surface: Surface) -> None:
    if not surface.layers_here:
        return
    by_layer = {"layer": surface.layers_here}
    by_head = by_layer | {"head": range(surface.num_heads)}
    _add_all(registry, HEAD_SUMS, "1", by_head)
    registry.derive("gate_mean", unit="1", powers={"gate_sum": 1, "gate_tokens": -1})
    registry.derive("attention_entropy", unit="nats", powers={"attention_entropy_sum": 1, "attention_samples": -1})
    _add_all(registry, RESIDUAL_SUMS, "1", by_layer)
    registry.add("residual_max", unit="1", reduction="max", axes=by_layer)
    registry.derive("residual_rms", unit="1", powers={"residual_square_sum": 0.5, "residual_elements": -0.5})
    _add_all(registry, GAIN_SUMS, "1", by_layer)
    for which in ("q", "k"):
        registry.derive(f"{which}_gain", unit="1", powers={f"{which}_gain_square_sum": 0.5, "gain_elements": -0.5})


def _register_modules(registry: Registry, surface: Surface) -> None:
    if surface.modules:
        by_module = {"module": surface.modules}
        _add_all(registry, ("output_square_sum", "output_elements"), "1", by_module)
        registry.add("output_max", unit="1", reduction="max", axes=by_module)
        registry.derive("output_rms", unit="1", powers={"output_square_sum": 0.5, "output_elements": -0.5})


def _register_parameters(registry: Registry, surface: Surface) -> None:
    _add_all(
        registry,
        ("gradient_square_sum", "parameter_square_sum", *UPDATE_SUMS),
        "1",
        {"parameter": surface.parameters},
    )
    registry.derive("gradient_norm", unit="1", powers={"gradient_square_sum": 0.5})
    registry.derive("parameter_norm", unit="1", powers={"parameter_square_sum": 0.5})
    registry.derive("update_ratio", unit="1", powers={"update_square_sum": 0.5, "parameter_square_sum": -0.5})
    registry.derive("orthogonality", unit="1", powers={"orthogonality_square_sum": 0.5, "matrices": -0.5})


def _register_losses(registry: Registry, surface: Surface) -> None:
    for prefix, axis, values in (
        ("source", "source", surface.sources),
        ("position", "position", surface.positions),
        ("mtp", "mtp_head", range(1, 1 + surface.num_mtp_heads)),
    ):
        if len(values):
            registry.add(f"{prefix}_loss_sum", unit="nats", reduction="sum", axes={axis: values})
            registry.add(f"{prefix}_targets", unit="tokens", reduction="sum", axes={axis: values})
            registry.derive(f"{prefix}_loss", unit="nats", powers={f"{prefix}_loss_sum": 1, f"{prefix}_targets": -1})


class Plane:
    """The values of one rank. Everything written between two calls of `reset` belongs to one step."""

    def __init__(self, registry: Registry, device: torch.device):
        self.registry = registry
        self._empty = torch.empty(registry.slots, dtype=torch.float32, device=device)
        for name, statistic in registry.statistics.items():
            registry.view(self._empty, name).fill_(RULES[statistic.reduction].nothing)
        self.values = self._empty.clone()
        """float32 [slots] on the device: sums (0 at the start) and maxima (NaN until there is a value)."""

    def view(self, *names: str) -> Tensor:
        """Return statistics that follow each other on one grid, as one tensor [S, grid…]; for a single one, without S.

        It shares the plane's memory.
        """
        statistics = [self.registry.statistics[name] for name in names]
        if len(statistics) == 1:
            return self.registry.view(self.values, names[0])
        first, count = statistics[0].first, statistics[0].count
        for position, statistic in enumerate(statistics):
            neighbours = statistic.first == first + position * count and statistic.grid == statistics[0].grid
            assert neighbours, f"{names} do not follow each other on one grid"
        return self.values[first : first + count * len(names)].view(len(names), *statistics[0].shape)

    @property
    def vital(self) -> Tensor:
        """Return the front, which is summed over all ranks."""
        return self.values[: self.registry.vital_slots]

    def reset(self, keep: Sequence[str] = ()) -> None:
        """Clear all values for the next step, but those of the statistics in `keep`."""
        kept = [(self.view(name), self.view(name).clone()) for name in keep]
        self.values.copy_(self._empty)
        for cells, values in kept:
            cells.copy_(values)


def raise_to(cells: Tensor, values: Tensor) -> None:
    """Set cells to the maximum of themselves and `values`, in place; a cell without a value takes the new one."""
    torch.fmax(cells, values, out=cells)
