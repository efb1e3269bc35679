"""Checks of a recipe on this machine: device, layout, back ends, memory, data, room for checkpoints, metrics.

    Recipe ─► device ─► layout (of the launcher's ranks, or the fewest that fit) ─► memory of a rank ─► the rest

Nothing is started and nothing is written: the network is made on the meta device.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from steptron.config.layouts import by_layout, parallel_of, ranks_of_stages, since
from steptron.config.schema import Recipe
from steptron.data.loader import missing_files
from steptron.doctor.finding import Finding, one_line, refused
from steptron.doctor.machine import GIB, cores, memory_bytes
from steptron.doctor.memory import NOTHING_FITS, dearest, described, key_of, what_fits
from steptron.doctor.network import answers
from steptron.errors import MeshError, SteptronError, typed
from steptron.model.flops import num_parameters
from steptron.model.transformer import Transformer
from steptron.moe.experts import choose_backend
from steptron.nn.attention import choose_attention
from steptron.nn.elementwise import choose_elementwise
from steptron.optim.optimizer import build_optimizer
from steptron.parallel.mesh import Layout, recipe_key, resolve_layout
from steptron.parallel.rules import layouts_of
from steptron.train.device import pick_device
from steptron.train.engines import check_package
from steptron.train.run import open_data
from steptron.train.run_folder import holds_run, run_dir

MOST_RANKS = 1 << 12
"""The largest number of ranks that is tried when searching one that fits a layout."""
WANDB = "https://api.wandb.ai"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The bytes that a run keeps, over all ranks."""

    weights: int
    """The bytes of parameters and router biases."""
    optimizer: int
    """The bytes of the optimizer's state."""

    @property
    def checkpoint(self) -> int:
        """Return the bytes of a checkpoint's tensors."""
        return self.weights + self.optimizer


def recipe_fits(recipe: Recipe, place: Path) -> Iterator[Finding]:
    """Check everything that the start of a run needs. `place` is the folder that the run folder is made in."""
    stages = f"{len(recipe.stages)} stages ({', '.join(recipe.stages)})"
    parameters = f"{num_parameters(recipe.model):,} parameters"
    yield Finding("recipe", "ok", f"{recipe.run.name}: {parameters}, {stages}, {recipe.precision}")
    try:
        device = pick_device(recipe.run)
    except SteptronError as error:
        yield refused("run.device", error)
        device = torch.device("cpu")  # the other checks run nevertheless
    else:
        yield Finding("run.device", "ok", f"{recipe.run.device}: {device.type}")
    layouts, finding = _layouts(recipe, device)
    yield finding
    yield _experts(recipe, device, layouts)
    if recipe.kernels.elementwise != "auto":
        yield _elementwise(recipe, device)
    if recipe.kernels.attention != "auto":
        yield _attention(recipe, device)
    if recipe.engine != "native":
        yield _engine(recipe.engine)
    if layouts:
        yield _memory(recipe, device, layouts)
    yield from _data(recipe)
    yield from _run_folder(recipe, sizes_of(recipe), place)
    yield from _metrics(recipe)


def sizes_of(recipe: Recipe) -> Sizes:
    """Return the sizes of the whole network and its optimizer, made on the meta device."""
    with torch.device("meta"):
        model = Transformer(recipe.model)
        parameters = dict(model.named_parameters())
        state = build_optimizer(parameters, recipe.optim).state()
    return Sizes(
        weights=sum(t.numel() * t.itemsize for t in (*parameters.values(), *model.buffers())),
        optimizer=sum(t.numel() * t.itemsize for t in state.values()),
    )


def _layouts(recipe: Recipe, device: torch.device) -> tuple[list[Layout], Finding]:
    """Check the layout of each part of the recipe (`by_layout`) for the launcher's ranks, or for the fewest that fit.

    The list is empty if no number of ranks fits.
    """
    cuda = device.type == "cuda"
    here = torch.cuda.device_count() if cuda else cores()
    what = "devices" if cuda else "cores"
    launched = "WORLD_SIZE" in os.environ
    try:
        layouts = layouts_of(recipe, int(os.environ["WORLD_SIZE"])) if launched else smallest(recipe)
    except MeshError as error:
        return [], refused("parallel", error)
    ranks, axes = max(layout.world_size for layout in layouts), _all_written(layouts)
    if launched and layouts[0].world_size != (started := int(os.environ["WORLD_SIZE"])):
        needed = _ranks(layouts[0].world_size)
        found = f"stage {next(iter(recipe.stages))} needs {needed}, {_ranks(started)} started: {axes}"
        return layouts, Finding("parallel", "failed", found, f"start {needed}")
    if launched:
        ranks = layouts[0].world_size
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1")))
        found = f"{ranks} ranks, {local} on this host with {here} {what}: {axes}"
        if cuda and local > here:
            return layouts, Finding("parallel", "failed", found, f"start at most {here} ranks on a host like this one")
        return layouts, Finding("parallel", "ok", found)
    found = f"needs at least {_ranks(ranks)}, and this machine has {here} {what}: {axes}"
    hosts = -(-ranks // here)
    if ranks <= here:
        return layouts, Finding("parallel", "ok", found)
    if not cuda:
        fix = f"start it with launch/local.sh {ranks}, which is slow here, or on {hosts} hosts like this one"
        return layouts, Finding("parallel", "note", found, fix)
    fix = f"start it on {hosts} hosts like this one (slurm/pretrain.sbatch), or with smaller parallel.*"
    return layouts, Finding("parallel", "failed", found, fix)


def smallest(recipe: Recipe) -> list[Layout]:
    """Return the layout of each part of the recipe (`by_layout`), over the fewest ranks that fit all parts without a
    number of their own.

    Raises the `MeshError` of the nearest number of ranks: the first whose products of axes are right.
    """
    fixed = next((name for name in recipe.stages if parallel_of(recipe, name).ranks), None)
    if fixed:
        layouts_of(since(recipe, fixed), 1)  # from there on, nothing depends on the number of the first stages
    nearest: MeshError | None = None
    for ranks in range(1, MOST_RANKS + 1):
        counts = ranks_of_stages(recipe, ranks)
        try:
            for part in by_layout(recipe):
                resolve_layout(part.parallel, counts[next(iter(part.stages))])
        except MeshError:
            continue
        try:
            return layouts_of(recipe, ranks)
        except MeshError as error:
            nearest = nearest or MeshError(f"with {ranks} ranks, {error}")
    raise nearest or MeshError(
        f"no number of ranks up to {MOST_RANKS} fits both parallel.dense and parallel.expert; "
        "set one axis of each to -1"
    )


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _all_written(layouts: list[Layout]) -> str:
    """Return the axes of all parts, with the number of ranks where it changes."""
    changes = len({layout.world_size for layout in layouts}) > 1
    return "; then ".join(
        f"{_ranks(layout.world_size)}, {_written(layout)}" if changes else _written(layout) for layout in layouts
    )


def _written(layout: Layout) -> str:
    """Return the axes above 1 of both views, by their keys in the recipe."""
    above = {recipe_key(axis): n for axis, n in (layout.dense | layout.expert).items() if n > 1}
    return " · ".join(f"{key}={n}" for key, n in above.items()) or "all axes 1"


def _experts(recipe: Recipe, device: torch.device, layouts: list[Layout]) -> Finding:
    columns = recipe.model.moe.ffn_size // max((layout.expert["etp"] for layout in layouts), default=1)
    chosen = recipe.kernels.experts
    try:
        backend = choose_backend(chosen, device, recipe.precision, (recipe.model.hidden_size, columns))
    except SteptronError as error:
        return refused("kernels.experts", error)
    except (ImportError, OSError, RuntimeError) as error:
        return Finding("kernels.experts", "failed", f"{chosen}: {one_line(error)}", "choose auto")
    return Finding("kernels.experts", "ok", backend.name if chosen == backend.name else f"{chosen}: {backend.name}")


def _attention(recipe: Recipe, device: torch.device) -> Finding:
    model, chosen = recipe.model, recipe.kernels.attention
    try:
        choose_attention(chosen, device, recipe.precision, model.head_dim, (model.full, model.sliding))
    except SteptronError as error:
        return refused("kernels.attention", error)
    return Finding("kernels.attention", "ok", chosen)


def _elementwise(recipe: Recipe, device: torch.device) -> Finding:
    try:
        return Finding("kernels.elementwise", "ok", choose_elementwise(recipe.kernels.elementwise, device))
    except SteptronError as error:
        return refused("kernels.elementwise", error)


def _engine(name: str) -> Finding:
    try:
        check_package(name)
    except SteptronError as error:
        return refused("engine", error)
    return Finding("engine", "ok", name)


def _room(device: torch.device, layout: Layout) -> tuple[int, str, int]:
    """Return the memory of a device, or of this host, in bytes; its kind; and the number of ranks that share it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, "device", 1
    return memory_bytes(), "host", int(os.environ.get("LOCAL_WORLD_SIZE", layout.world_size))


def _memory(recipe: Recipe, device: torch.device, layouts: list[Layout]) -> Finding:
    """Compare the memory of a device, or of this host for all its ranks, with what a rank takes."""
    name, cuda = "memory of a rank", device.type == "cuda"
    if recipe.engine != "native":
        return Finding(name, "note", f"not known for engine={recipe.engine}", "watch the first steps")
    worst, found, failed = 0.0, "", None
    for part, layout in zip(by_layout(recipe), layouts, strict=True):
        most, (room, of, local) = dearest(part, layout, cuda), _room(device, layout)
        if (share := sum(most.memory) * local / room) <= worst:
            continue
        worst, failed = share, (part, layout, cuda, room / local, key_of(recipe, most.stage))
        ranks = f"; {local} such ranks" if local > 1 else ""
        found = f"{described(most, layout)}{ranks} per {of} of {room / GIB:.1f} GiB"
    if worst < 1 or failed is None:
        return Finding(name, "ok", found)
    return Finding(name, "failed", found, what_fits(*failed) or NOTHING_FITS)


def _data(recipe: Recipe) -> Iterator[Finding]:
    """Check the files first, each by its key. If all exist, open them as a run does."""
    missing = missing_files(recipe.data, recipe.data.sources)
    for key, path in missing.items():
        command = recipe.data.build_command or "steptron data build"
        yield Finding(key, "failed", f"{path} does not exist", f"build it with `{command}`")
    if missing:
        return
    try:
        loader = open_data(recipe).loader
    except SteptronError as error:
        yield refused("data", error)
    else:
        yield Finding("data", "ok", f"{', '.join(loader.sources)}: {loader.fingerprint}")


def _run_folder(recipe: Recipe, sizes: Sizes, place: Path) -> Iterator[Finding]:
    folder = run_dir(recipe.run)
    if holds_run(folder):
        fix = f"continue it with {typed('resume', folder)}, or give another run.name"
        yield Finding("run.dir", "failed", f"{folder} already holds a run", fix)
    else:
        yield Finding("run.dir", "ok", f"{folder}")
    free, one, keep = shutil.disk_usage(place).free, sizes.checkpoint, recipe.checkpoint.keep
    found = f"{one / GIB:.2f} GiB each, {keep} kept and one being written, {free / GIB:.1f} GiB free at {place}"
    fix = "free some space, choose another folder with run.dir=…, or keep fewer with checkpoint.keep=…"
    state = "failed" if free < one else "note" if free < one * (keep + 1) else "ok"
    yield Finding("checkpoints", state, found, "" if state == "ok" else fix)
    start = recipe.checkpoint.init_from
    if start and not Path(start).is_dir():
        yield Finding("checkpoint.init_from", "failed", f"{start} does not exist", "name a run folder or a checkpoint")


def _metrics(recipe: Recipe) -> Iterator[Finding]:
    """Check W&B's account and server, and the metrics servers. A run continues without them, so none is required."""
    monitor = recipe.monitor
    if monitor.wandb.mode == "online" and monitor.level != "off":
        yield _wandb()
    for address in monitor.server.addresses:
        host, _, port = address.rpartition(":")
        why = answers(host.strip("[]"), int(port))
        fix = "start it with `steptron monitor serve`; until then ranks keep their frames in metrics/spool"
        found = f"{address}: {why}" if why else f"{address} answers"
        yield Finding("monitor.server", "note" if why else "ok", found, fix if why else "")
    for key in ("token_file", "certificate") if monitor.server.addresses else ():
        path = getattr(monitor.server, key)
        if path and not Path(path).is_file():
            fix = "create it, or leave the key empty"
            yield Finding(f"monitor.server.{key}", "failed", f"{path} does not exist", fix)


def _wandb() -> Finding:
    from urllib.parse import urlsplit

    import wandb

    url = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB))
    port = url.port or (443 if url.scheme == "https" else 80)
    fix = "the run then logs offline, and `wandb sync` sends it later"
    if why := answers(url.hostname or "", port):
        return Finding("monitor.wandb", "note", f"online, but {url.hostname}:{port} cannot be reached: {why}", fix)
    try:
        known = wandb.login(prompt=False)
    except Exception as error:  # the library may raise anything
        return Finding("monitor.wandb", "note", f"online, but W&B refuses: {one_line(error)}", fix)
    if not known:
        return Finding("monitor.wandb", "note", "online, but there is no API key here", f"run `wandb login`; {fix}")
    return Finding("monitor.wandb", "ok", f"online, {url.hostname} answers and there is an API key")
