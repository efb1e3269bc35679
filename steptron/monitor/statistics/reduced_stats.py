"""The vital statistics: the front of the plane, summed over all ranks once a step, from which detectors decide.

They are the same on every rank, so that all ranks decide alike; rank 0 stores them for all.
"""

from collections.abc import Mapping, Sequence

from steptron.monitor.statistics.registry import Registry

RUN_SUMS = {"loss": "nats", "total_loss": "nats", "grad_norm": "1"}
"""Units by name, as in the tables below."""
RANK_SUMS = {
    "step_time": "s",  # of the previous step: the current step's time is not known while it is judged
    "data_wait": "s",
    "communication_time": "s",
    "not_finite": "gradients",  # parameters whose gradient is NaN or infinite on the rank
}
ROUTER_SUMS = {"router_tokens": "tokens", "confidence_sum": "tokens", "entropy_sum": "nats", "margin_sum": "1"}
"""These have one value per layer."""
EXPERT_SUMS = {
    "rows": "tokens",  # tokens that the experts computed, on each rank that holds a part of the expert
    "elements": "1",  # rows · columns of the FFN intermediate on the rank
    "h_square_sum": "1",
    "out_norm_sum": "1",
}
"""These have one value per layer and expert. They are sums over the forward pass."""


def register_vitals(registry: Registry, layers: Sequence[int], num_experts: int, world_size: int) -> None:
    """Lay out the vital statistics.

    Args:
        registry: an empty registry.
        layers: global indices of the MoE layers.
        num_experts: number of routed experts per layer.
        world_size: number of ranks.
    """

    def add(units: Mapping[str, str], axes: Mapping[str, Sequence[int]]) -> None:
        for name, unit in units.items():
            registry.add(name, unit=unit, reduction="sum", axes=axes, vital=True)

    add(RUN_SUMS, {})
    add(RANK_SUMS, {"rank": list(range(world_size))})
    if not layers:
        return
    add(ROUTER_SUMS, {"layer": list(layers)})
    registry.derive("routing_confidence", unit="1", powers={"confidence_sum": 1, "router_tokens": -1})
    registry.derive("router_entropy", unit="nats", powers={"entropy_sum": 1, "router_tokens": -1})
    registry.derive("topk_margin", unit="1", powers={"margin_sum": 1, "router_tokens": -1})
    # `tokens` are the choices of the routers.
    units = {"tokens": "tokens", **EXPERT_SUMS, "weight_square_sum": "1"}
    add(units, {"layer": list(layers), "expert": list(range(num_experts))})
    registry.derive("activation_rms", unit="1", powers={"h_square_sum": 0.5, "elements": -0.5})
    registry.derive("out_norm", unit="1", powers={"out_norm_sum": 1, "rows": -1})
    registry.derive("weight_norm", unit="1", powers={"weight_square_sum": 0.5})
