"""The ranks of a run: the process group, the meshes over it, and the coordinators that checkpoints are saved with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from steptron.checkpoint.coordinator import Coordinator
from steptron.config.layouts import by_layout, parallel_of, since
from steptron.config.schema import Recipe
from steptron.errors import MeshError, OtherRanks, RankLostError
from steptron.parallel.collectives import broadcast_from_rank0, limit_all_groups, run_on_all_ranks
from steptron.parallel.mesh import Layout, Meshes, build_meshes
from steptron.parallel.rules import layouts_of
from steptron.train.device import keep_heap, one_order

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables that a launcher gives each rank, and from which torch makes the process group."""


def launched_layouts(recipe: Recipe, stage: str = "") -> dict[str, Layout]:
    """Return the layouts of `stage` ("": the first one), which comes next, and of all later stages.

    The first of them has the ranks that the launcher started (or this single process). Raises `MeshError` if a stage
    cannot have its layout, and `OtherRanks` if `stage` needs another number of ranks.
    """
    stage = stage or next(iter(recipe.stages))
    coming, ranks = since(recipe, stage), int(os.environ.get("WORLD_SIZE", "1"))
    refuse_other_ranks(recipe, stage)
    parts = zip(by_layout(coming), layouts_of(coming, ranks), strict=True)
    return {name: layout for part, layout in parts for name in part.stages}


def refuse_other_ranks(recipe: Recipe, stage: str, folder: Path | None = None) -> None:
    """Raise `OtherRanks` if the stage has another number of ranks than there are.

    `folder`: the run folder, with all that a resume needs. None: nothing has begun, and the same command is repeated.
    """
    needed, ranks = parallel_of(recipe, stage).ranks, int(os.environ.get("WORLD_SIZE", "1"))
    if needed is None or needed == ranks:
        return
    key = "parallel.ranks" if recipe.stages[stage].parallel is None else f"stages.{stage}.parallel.ranks"
    raise OtherRanks(
        f"stage {stage} needs {needed} rank{'s' * (needed > 1)} ({key}), there {'are' if ranks > 1 else 'is'} {ranks}",
        needed,
        str(folder or ""),
    )


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
def process_group(device: torch.device, timeout_s: float, deterministic: bool = False) -> Iterator[None]:
    """Join torchrun's ranks (or be the only one). The group is destroyed at the end. A collective fails after
    `timeout_s`. `deterministic`: sums have one order inside. Raises `MeshError` if the launcher's variables are
    incomplete."""
    check_launched()
    keep_heap()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        # With its device, NCCL connects here, and not in the first collective, where a rank without network would hang.
        dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        with one_order(device, deterministic):
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
