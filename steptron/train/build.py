"""One function a component: from the recipe to ranks, meshes, model, optimizer, data, monitor."""

import ctypes
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from steptron.atomic import atomic_write, make_folder
from steptron.checkpoint.coordinator import Coordinator
from steptron.checkpoint.manifest import ABANDONED, list_checkpoints
from steptron.checkpoint.remote import Remote
from steptron.config import identity
from steptron.config.identity import Identity
from steptron.config.resolve import to_yaml
from steptron.config.schema import Recipe, StageConfig
from steptron.data.loader import Loader
from steptron.errors import CheckpointError, RankLostError, RecipeError, typed
from steptron.monitor.sinks import metrics_jsonl
from steptron.monitor.sinks.progress import Warnings
from steptron.monitor.storage import ledger
from steptron.monitor.storage.log_times import StampedFormatter
from steptron.parallel.collectives import limit_all_groups, run_on_all_ranks
from steptron.parallel.mesh import Layout, Meshes, build_meshes, resolve_layout
from steptron.parallel.rules import check_layout

log = logging.getLogger("steptron")
Found = TypeVar("Found")

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names in glibc's malloc.h."""


def run_dir(recipe: Recipe) -> Path:
    """The run folder, `runs/NAME` unless the recipe says otherwise."""
    return Path(recipe.run.dir or f"runs/{recipe.run.name}")


def pick_device(recipe: Recipe) -> torch.device:
    """This rank's device. Raises `RecipeError` where the one asked for is not there."""
    wanted = recipe.run.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RecipeError("run.device=cuda but torch finds no CUDA device here; set run.device=cpu or auto")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def keep_heap() -> None:
    """Have glibc keep freed memory for the next step.

    By default it hands every large tensor back to the kernel, which then clears its pages anew: a tenth to a third of a CPU step.
    Other C libraries have no such call, and CUDA tensors have an allocator of their own."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


@contextmanager
def ranks(recipe: Recipe, device: torch.device) -> Iterator[Meshes]:
    """The process group of torchrun's ranks (or of this one process alone) and both meshes over it."""
    keep_heap()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    layout = resolve_layout(recipe.parallel, world_size)
    check_layout(recipe, layout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=recipe.run.timeout_s)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        meshes = build_meshes(layout, device.type)
        limit_all_groups(recipe.run.timeout_s)
        yield meshes
    except RankLostError:
        raise  # taking the group down may wait for the lost rank
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def team(group: dist.ProcessGroup | None = None) -> Coordinator:
    """All ranks, for saving and loading; in a group of their own where one is given."""
    return Coordinator(
        rank=dist.get_rank(),
        ranks=dist.get_world_size(),
        run_on_all_ranks=lambda action: run_on_all_ranks(action, group),
        from_first=lambda action: broadcast_from_rank0(action, group),
        group=group,
    )


def broadcast_from_rank0(look: Callable[[], Found], group: dist.ProcessGroup | None = None) -> Found:
    """What rank 0 sees, the same on all ranks; a `SteptronError` there is raised everywhere."""
    found = run_on_all_ranks(lambda: [look()] if dist.get_rank() == 0 else [None], group)
    dist.broadcast_object_list(found, src=0, group=group)
    return found[0]  # pyright: ignore[reportReturnType]


def pin_groups(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe with the groups of the EP-group loss written out where they follow from `ep`.

    The run folder keeps them so: a run that goes on under another `ep` goes on with the same loss."""

    def pinned(stage: StageConfig) -> StageConfig:
        if stage.balance.ep_loss == 0 or stage.balance.num_groups is not None:
            return stage
        return replace(stage, balance=replace(stage.balance, num_groups=layout.expert["ep"]))

    return replace(recipe, stages={name: pinned(stage) for name, stage in recipe.stages.items()})


def second_place(recipe: Recipe) -> Remote | None:
    """Where this run's checkpoints are copied to: a folder by its name, so that runs of one recipe do not meet there."""
    if not recipe.checkpoint.mirror_to:
        return None
    return Remote(f"{recipe.checkpoint.mirror_to.rstrip('/')}/{recipe.run.name}")


def refuse_place_of_another(recipe: Recipe, folder: Path, ours: Identity, new: bool) -> None:
    """Raise `RecipeError` where the second place holds another run's checkpoints: the first copy would remove those of later steps.

    A new run is also refused where the place does not answer (`CheckpointError`); one that goes on does without it for now."""
    place = second_place(recipe)
    if place is None:
        return
    try:
        steps, owner = place.steps(), place.owner()
    except CheckpointError:
        if new:
            raise
        return
    if not steps or owner == ours.id or not (owner or new or ours.copy_of):
        return
    told = f"checkpoint.mirror_to={recipe.checkpoint.mirror_to}: {place.url} holds another run's checkpoints, up to step {steps[0]}"
    if not new and not ours.copy_of:
        raise RecipeError(f"{told}; give another place, or a folder in it that is empty")
    if ours.copy_of:
        raise RecipeError(
            f"{told}, and {folder} is a copy of a run's folder; give the copy a name of its own: {typed('resume', folder, 'run.name=NAME')}"
        )
    raise RecipeError(
        f"{told}; continue it with {typed('resume', folder, '--from', place.url)}, or give another run.name or another place"
    )


def keep_groups(recipe: Recipe, old: Recipe) -> Recipe:
    """The recipe with the groups of the EP-group loss that the run was started with, where it does not name others."""

    def kept(name: str, stage: StageConfig) -> StageConfig:
        before = old.stages.get(name)
        if stage.balance.ep_loss == 0 or stage.balance.num_groups is not None or before is None:
            return stage
        return replace(stage, balance=replace(stage.balance, num_groups=before.balance.num_groups))

    return replace(recipe, stages={name: kept(name, stage) for name, stage in recipe.stages.items()})


def holds_run(folder: Path) -> bool:
    """Return whether there is something of a run in `folder` that a new run there would lose: a step, or a checkpoint.

    A start that failed before its first step leaves neither. The lock is to be held."""
    if not (folder / "recipe.yaml").is_file():
        return False
    metrics, checkpoints = folder / metrics_jsonl.FILE_NAME, folder / "checkpoints"
    return (
        (metrics.is_file() and metrics.stat().st_size > 0)
        or bool(list_checkpoints(checkpoints))
        or any(checkpoints.glob(f"{ABANDONED}*"))
        or bool(ledger.read(folder, "checkpoint", "rewind"))  # all that is left of one that was brought back
    )


def make_run_dir(folder: Path) -> None:
    """Make the run folder. Raises `RecipeError` where it cannot be."""
    try:
        make_folder(folder)
    except OSError as error:
        raise _cannot_be_written(folder, error) from error


def keep_recipe(recipe: Recipe, folder: Path) -> None:
    """Write `recipe.yaml` into the run folder, complete or not at all. Raises `RecipeError` where that cannot be."""
    _keep(folder, "recipe.yaml", to_yaml(recipe))


def keep_identity(ours: Identity, folder: Path) -> None:
    """Write `run.json` into the run folder, complete or not at all. Raises `RecipeError` where that cannot be."""
    _keep(folder, identity.NAME, ours.to_json())


def _keep(folder: Path, name: str, text: str) -> None:
    try:
        with atomic_write(folder / name, durable=True) as temporary:
            temporary.write_text(text)
    except OSError as error:
        raise _cannot_be_written(folder, error) from error


def _cannot_be_written(folder: Path, error: OSError) -> RecipeError:
    return RecipeError(
        f"run.dir={folder} cannot be written: {error.strerror}; make room or mend its rights, or choose another with run.dir=…"
    )


def build_loader(recipe: Recipe) -> Loader:
    """The sources of all stages, opened and checked."""
    return Loader(
        recipe.data,
        recipe.stages,
        seed=recipe.seed,
        num_mtp_heads=recipe.model.num_mtp_heads,
        vocab_size=recipe.model.vocab_size,
    )


class _LogFile(logging.FileHandler):
    """A disk that takes no more costs the lines alone."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: logging's own way is a traceback on the terminal for each line."""

    def close(self) -> None:
        """Close the file, whatever of it could not be written."""
        with suppress(OSError):
            super().close()


def _open_log(folder: Path) -> logging.Handler:
    try:
        (folder / "logs").mkdir(exist_ok=True)
        return _LogFile(folder / "logs" / f"rank-{dist.get_rank():05d}.log")
    except OSError as error:
        raise _cannot_be_written(folder, error) from error


@contextmanager
def logs(folder: Path) -> Iterator[None]:
    """Inside, send this rank's log lines to `logs/rank-RRRRR.log` in the run folder, and warnings of rank 0 to the terminal too.

    Raises `RecipeError`, on all ranks, where one of them cannot open its file."""
    file = run_on_all_ranks(lambda: _open_log(folder))
    file.setFormatter(StampedFormatter("%(asctime)s %(levelname)s %(message)s"))
    handlers: list[logging.Handler] = [file] if dist.get_rank() else [file, Warnings()]
    for handler in handlers:
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
