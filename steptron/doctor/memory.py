"""The memory that a rank takes during training, from the recipe and the layout alone, and what makes it fit.

pipeline stages of a rank ─► parameters and optimizer state on the meta device ─► ÷ the ranks that share each
                          ─► parameters as FSDP gathers them, with the gradients that add up there
                          ─► activations of the micro-batches in flight (activations.py)
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from steptron.config.layouts import by_layout
from steptron.config.schema import Recipe, StageConfig
from steptron.doctor.activations import BYTES, rank_activations
from steptron.doctor.machine import GIB
from steptron.errors import MeshError, RecipeError
from steptron.model.parts import Part
from steptron.model.transformer import Transformer
from steptron.optim.optimizer import build_optimizer
from steptron.parallel.mesh import Layout, resolve_layout
from steptron.parallel.pipeline_split import cut, ranks_of_stages
from steptron.parallel.rules import check_layout

FP32 = 4
NOTHING_FITS = "take more ranks, or a smaller model"
WHOLE = (".shared.", ".router.", "norm", "eh_proj")
"""Parts of the names of parameters that tp does not split."""
CHEAPEST_FIRST = (("permutation",), ("norm", "silu", "permutation"), ("ffn", "norm"), ("attention", "ffn"))
"""Parts to recompute in backward, those that cost least time first."""


class RankMemory(NamedTuple):
    """The bytes of a rank. What lives within one operation and what the allocator leaves unused come on top."""

    weights: int
    """The bytes of its shards of parameters, and of router biases."""
    gradients: int
    """The bytes of its shards of gradients, which are reduced in fp32."""
    optimizer: int
    """The bytes of its shards of the optimizer's state."""
    gathered: int
    """The bytes of parameters that FSDP holds gathered at a time, and of gradients that add up over micro-batches."""
    activations: int
    """The bytes kept for the backward passes of the micro-batches in flight."""


class Dearest(NamedTuple):
    """The rank that takes most, in the stage in which it does."""

    stage: str
    """The stage's name."""
    pp_rank: int
    """The pipeline rank."""
    memory: RankMemory
    """The bytes of each such rank."""


def dearest(recipe: Recipe, layout: Layout, cuda: bool) -> Dearest:
    """Return the rank that takes most memory under `engine: native`. All stages of the recipe have this layout."""
    alike: dict[tuple, str] = {}
    for name, stage in recipe.stages.items():
        alike.setdefault((stage.micro_batch, stage.seq_len, stage.batch_size), name)
    found = [
        Dearest(name, rank, memory)
        for name in alike.values()
        for rank, memory in enumerate(rank_memories(recipe, recipe.stages[name], layout, cuda))
    ]
    return max(found, key=lambda one: sum(one.memory))


def rank_memories(recipe: Recipe, stage: StageConfig, layout: Layout, cuda: bool) -> list[RankMemory]:
    """Return the memory of a rank in this stage, for each pipeline rank."""
    parallel, pp = recipe.parallel, layout.dense["pp"]
    held = [RankMemory(0, 0, 0, 0, kept) for kept in rank_activations(recipe, stage, layout, cuda)]
    for owner, part in zip(ranks_of_stages(parallel.pipeline, pp), cut(recipe, pp), strict=True):
        more = _part_memory(recipe, stage, layout, part)
        held[owner] = RankMemory(*(a + b for a, b in zip(held[owner], more, strict=True)))
    return held


def refuse_what_cannot_fit(recipe: Recipe, layouts: Mapping[str, Layout], device: torch.device) -> None:
    """Raise `RecipeError` if a stage takes more memory than a CUDA device has. `layouts`: by stage."""
    if device.type != "cuda" or recipe.engine != "native":
        return
    room = torch.cuda.get_device_properties(device).total_memory
    for part in by_layout(recipe):
        most = dearest(part, layout := layouts[next(iter(part.stages))], cuda=True)
        if sum(most.memory) > room:
            fix = what_fits(part, layout, True, room, key_of(recipe, most.stage)) or NOTHING_FITS
            raise RecipeError(f"{described(most, layout)}, more than the {room / GIB:.1f} GiB of {device}; {fix}")


def described(most: Dearest, layout: Layout) -> str:
    """Return in words what a rank takes, and where."""
    where = f"stage {most.stage}" + (f", pipeline rank {most.pp_rank}" if layout.dense["pp"] > 1 else "")
    sizes = " + ".join(f"{name} {size / GIB:.1f}" for name, size in most.memory._asdict().items())
    return f"{where}: {sizes} = {sum(most.memory) / GIB:.1f} GiB"


def key_of(recipe: Recipe, stage: str) -> str:
    """Return the key of the layout of a stage."""
    return "parallel" if recipe.stages[stage].parallel is None else f"stages.{stage}.parallel"


def what_fits(recipe: Recipe, layout: Layout, cuda: bool, room: float, key: str) -> str:
    """Return the cheapest change of the recipe with which each rank takes at most `room` bytes, and how much then.

    It tries recomputation first, then context parallelism over twice as many ranks with each kind of recomputation, up
    to 64 ranks for a row. The result is empty if nothing is enough. `key` is the key of the layout in the recipe.
    """
    memory = dearest(recipe, layout, cuda).memory
    if sum(memory) - memory.activations > room:
        return ""
    for changes, changed in _cheapest_first(recipe, layout):
        try:
            new = resolve_layout(changed.parallel, layout.world_size)
            check_layout(changed, new)
        except MeshError:
            continue
        taken = sum(dearest(changed, new, cuda).memory)
        if taken <= room:
            words = " ".join(f"{key}.{change}" for change in changes)
            return f"set {words}, with which it takes {taken / GIB:.1f} GiB"
    return ""


def _cheapest_first(recipe: Recipe, layout: Layout) -> Iterator[tuple[list[str], Recipe]]:
    """Yield changes of the recipe's layout, as overrides without their section, and the recipe with them."""
    parallel, cp = recipe.parallel, layout.dense["cp"]
    parts = [parallel.recompute.parts, *(p for p in CHEAPEST_FIRST if not set(p) <= set(parallel.recompute.parts))]
    while cp <= 64:
        for chosen in parts:
            changed = replace(
                parallel,
                dense=replace(parallel.dense, cp=cp),
                recompute=replace(parallel.recompute, parts=tuple(chosen)),
            )
            words = [f"dense.cp={cp}"] if cp != layout.dense["cp"] else []
            words += [f"recompute.parts=[{','.join(chosen)}]"] if chosen != parallel.recompute.parts else []
            yield words, replace(recipe, parallel=changed)
        cp *= 2


def _part_memory(recipe: Recipe, stage: StageConfig, layout: Layout, part: Part) -> RankMemory:
    dense, expert = layout.dense, layout.expert
    with torch.device("meta"):
        model = Transformer(recipe.model, part)
        parameters = dict(model.named_parameters())
        state = build_optimizer(parameters, recipe.optim).state()

    def share(name: str, tensor: torch.Tensor) -> int:
        """Return the bytes of a rank's piece."""
        of_dense, of_expert = dense["dp_shard"] * dense["cp"] * dense["tp"], expert["edp_shard"] * expert["ep"]
        ranks = of_expert * expert["etp"] if ".experts." in name else of_dense
        return -(-tensor.numel() * tensor.itemsize // ranks)

    def whole(name: str, tensor: torch.Tensor) -> int:
        """Return the elements of a rank's piece when it is gathered."""
        if ".experts." in name:
            return tensor.numel() // (expert["ep"] * expert["etp"])
        return tensor.numel() // (1 if any(mark in name for mark in WHOLE) else dense["tp"])

    weights = sum(share(name, tensor) for name, tensor in parameters.items())
    biases = sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())
    gathered = {name: whole(name, tensor) for name, tensor in parameters.items()}
    optimizer = sum(share(name, tensor) for name, tensor in state.items())
    return RankMemory(weights + biases, weights, optimizer, _gathered(recipe, stage, layout, gathered), 0)


def _gathered(recipe: Recipe, stage: StageConfig, layout: Layout, elements: dict[str, int]) -> int:
    """Return the bytes that FSDP holds at most of these parameters, besides the shards (see parallel/fsdp.py).

    Ranks of a pipeline keep all that they have gathered until the step ends, and add the gradients of micro-batches up
    in fp32. Without a pipeline two units are gathered at a time, and the root, and one unit has gradients.
    """
    value = BYTES[recipe.precision]
    if layout.dense["pp"] > 1:
        several = stage.batch_size // (stage.micro_batch * layout.data_ranks) > 1
        return sum(elements.values()) * (value + (FP32 if several else value))
    units: dict[str, int] = {}
    for name, count in elements.items():
        owner, *inner = name.split(".")
        unit = f"{owner}.{inner[0]}" if owner in ("layers", "mtp") else "root"
        units[unit] = units.get(unit, 0) + count
    root = units.pop("root", 0)
    if layout.world_size == 1:
        return (root + sum(units.values())) * value
    largest = max(units.values(), default=0)
    return (root + 2 * largest) * value + max(root, largest) * (value + FP32)
