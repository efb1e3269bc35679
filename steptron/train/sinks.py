"""The destinations of a rank's metrics, chosen by the recipe.

every level     rank 0    metrics.jsonl
light           rank 0    the store of the metrics plane, or a metrics server · W&B
full            all       the store or a server; rank 0 also W&B, with the planes of all ranks
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from steptron.config.identity import Identity
from steptron.config.monitoring import MonitorConfig
from steptron.monitor.sinks.collector import MakeSink
from steptron.monitor.sinks.metrics_jsonl import JsonlSink
from steptron.monitor.sinks.plane import PlaneSink
from steptron.monitor.sinks.wandb import WandbSink
from steptron.monitor.statistics.gather import Gather
from steptron.monitor.statistics.plane import Plane
from steptron.monitor.statistics.registry import Registry


def stores_plane(config: MonitorConfig) -> bool:
    """Return whether this rank stores its metrics plane."""
    return config.level == "full" or (dist.get_rank() == 0 and config.level == "light")


def make_gather(config: MonitorConfig, plane: Plane) -> Gather | None:
    """Return what combines all ranks' planes for W&B, or None if rank 0 has everything that W&B gets. All ranks call
    it."""
    alone = dist.get_world_size() == 1 or config.level != "full" or config.wandb.mode == "disabled"
    return None if alone else Gather(plane.registry, plane.values.device)


def make_sinks(
    config: MonitorConfig,
    folder: Path,
    ours: Identity,
    run_name: str,
    recipe: Mapping[str, Any],
    registry: Registry,
    combined: Registry,
    resumed: int | None,
) -> dict[str, MakeSink]:
    """Return the constructors of this rank's sinks by name.

    Args:
        config: the section `monitor` of the recipe.
        folder: the run folder.
        ours: the identity of the run.
        run_name: the name of the run.
        recipe: all values of the recipe, for W&B's table.
        registry: the layout of this rank's plane.
        combined: the layout of what W&B gets.
        resumed: the step of the checkpoint that the run continues from; None: a new run.
    """
    rank, sinks = dist.get_rank(), {}
    if rank == 0:
        sinks["metrics.jsonl"] = lambda: JsonlSink(folder)
    registry = registry if rank == 0 else registry.own()
    if config.level == "off" or registry.slots == 0:
        return sinks
    store = config.store or str(folder / "metrics")
    writers = dist.get_world_size() if config.level == "full" else 1
    if config.server.addresses:
        from steptron.monitor.sinks.server import ServerSink  # Arrow Flight takes long to import

        sinks["the metrics server"] = lambda: ServerSink(
            folder,
            config.server,
            run_name,
            registry,
            uid=ours.id,
            attempt=ours.attempt,
            rank=rank,
            writers=writers,
            resumed=resumed,
        )
    else:
        sinks["the metrics plane"] = lambda: PlaneSink(store, registry, config.flush_every, rank, writers)
    if rank == 0 and config.wandb.mode != "disabled":
        sinks["W&B"] = lambda: WandbSink(folder, config.wandb, ours.id, run_name, recipe, combined)
    return sinks
