"""The ranks of a run: the process group, the meshes over it, and the coordinators that checkpoints are saved with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from steptron.checkpoint.coordinator import Coordinator
from steptron.config.layouts import by_layout
from steptron.config.schema import Recipe
from steptron.errors import MeshError, RankLostError
from steptron.parallel.collectives import broadcast_from_rank0, limit_all_groups, run_on_all_ranks
from steptron.parallel.mesh import Layout, Meshes, build_meshes, resolve_layout
from steptron.parallel.rules import check_layout
from steptron.train.device import keep_heap

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables that a launcher gives each rank, and from which torch makes the process group."""


def launched_layouts(recipe: Recipe) -> dict[str, Layout]:
    """Return the layout of each stage over the ranks that the launcher started (or this single process).

    Raises `MeshError` if a stage cannot have its layout.
    """
    layouts: dict[str, Layout] = {}
    for part in by_layout(recipe):
        try:
            layout = resolve_layout(part.parallel, int(os.environ.get("WORLD_SIZE", "1")))
            check_layout(part, layout)
        except MeshError as error:
            own = [name for name in part.stages if recipe.stages[name].parallel is not None]
            raise (MeshError(f"stages.{own[0]}, which has its own layout: {error}") if own else error) from error
        layouts |= dict.fromkeys(part.stages, layout)
    return layouts


def check_launched() -> None:
    """Raise `MeshError` if only some of the launcher's variables are set, or if RANK is not below WORLD_SIZE."""
    missing = [name for name in LAUNCHED if name not in os.environ]
    if missing and ("RANK" in os.environ or "WORLD_SIZE" in os.environ):
        raise MeshError(
            f"{', '.join(name for name in LAUNCHED if name not in missing)} without {', '.join(missing)} in the "
            "environment: a launcher sets all of them; start ranks with launch/local.sh, torchrun or srun, or remove "
            f"them with `unset {' '.join(LAUNCHED)}`"
        )
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank >= ranks:
        raise MeshError(f"RANK={rank} must be below WORLD_SIZE={ranks}; ranks are counted from 0")


@contextmanager
def process_group(device: torch.device, timeout_s: float) -> Iterator[None]:
    """Join torchrun's ranks (or be the only one). The group is destroyed at the end. A collective fails after
    `timeout_s`. Raises `MeshError` if the launcher's variables are incomplete."""
    check_launched()
    keep_heap()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield
    except RankLostError:
        raise  # destroying the group may wait for the lost rank
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def meshes_over(layout: Layout, device: torch.device, timeout_s: float) -> Meshes:
    """Return both meshes over the ranks of the process group. A collective in them fails after `timeout_s`."""
    meshes = build_meshes(layout, device.type)
    limit_all_groups(timeout_s)
    return meshes


def make_coordinator(group: dist.ProcessGroup | None = None) -> Coordinator:
    """Return all ranks as saving and loading need them. `group`: a group of all ranks; None: the default group."""
    return Coordinator(
        rank=dist.get_rank(),
        ranks=dist.get_world_size(),
        run_on_all_ranks=lambda action: run_on_all_ranks(action, group),
        from_first=lambda action: broadcast_from_rank0(action, group),
        group=group,
    )


def make_saving_coordinator(timeout_s: float) -> Coordinator:
    """Return all ranks in a new process group.

    Its collectives never mix with those of a step, and may take `timeout_s`, as long as saving may take.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if dist.get_world_size() > 1 else None
    assert not isinstance(group, int), "every rank is in it"
    return make_coordinator(group)
