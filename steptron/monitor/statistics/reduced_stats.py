"""The vital statistics: the front of the plane, summed over all ranks once a step, from which detectors decide.

They are the same on every rank, so that all ranks decide alike; rank 0 stores them for all.
"""

from collections.abc import Sequence

from steptron.monitor.statistics.registry import Registry


def register_vitals(registry: Registry, layers: Sequence[int], num_experts: int, world_size: int) -> None:
    """Lay out the vital statistics.

    Args:
        registry: an empty registry.
        layers: global indices of the MoE layers.
        num_experts: number of routed experts per layer.
        world_size: number of ranks.
    """
    run = {}
    for name, unit in (("loss", "nats"), ("total_loss", "nats"), ("grad_norm", "1")):
        registry.add(name, unit=unit, reduction="sum", axes=run, vital=True)
    ranks = {"rank": list(range(world_size))}
    for name, unit in (
        ("step_time", "s"),  # of the previous step: the current step's time is not known while it is judged
        ("data_wait", "s"),
        ("communication_time", "s"),
        ("not_finite", "gradients"),  # parameters whose gradient is NaN or infinite on the rank
    ):
        registry.add(name, unit=unit, reduction="sum", axes=ranks, vital=True)
    if not layers:
        return
    by_layer = {"layer": list(layers)}
    for name, unit in (
        ("router_tokens", "tokens"),
        ("confidence_sum", "tokens"),
        ("entropy_sum", "nats"),
        ("margin_sum", "1"),
    ):
        registry.add(name, unit=unit, reduction="sum", axes=by_layer, vital=True)
    registry.derive("routing_confidence", unit="1", powers={"confidence_sum": 1, "router_tokens": -1})
    registry.derive("router_entropy", unit="nats", powers={"entropy_sum": 1, "router_tokens": -1})
    registry.derive("topk_margin", unit="1", powers={"margin_sum": 1, "router_tokens": -1})
    by_expert = {"layer": list(layers), "expert": list(range(num_experts))}
    for name, unit in (
        ("tokens", "tokens"),  # choices of the routers
        ("rows", "tokens"),  # tokens that the experts computed, on each rank that holds a part of the expert
        ("elements", "1"),  # rows · columns of the FFN intermediate on the rank
        ("h_square_sum", "1"),
        ("out_norm_sum", "1"),
        ("weight_square_sum", "1"),
    ):
        registry.add(name, unit=unit, reduction="sum", axes=by_expert, vital=True)
    registry.derive("activation_rms", unit="1", powers={"h_square_sum": 0.5, "elements": -0.5})
    registry.derive("out_norm", unit="1", powers={"out_norm_sum": 1, "rows": -1})
    registry.derive("weight_norm", unit="1", powers={"weight_square_sum": 0.5})
