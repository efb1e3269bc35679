"""Rules that the model and the stages impose on a layout, checked before anything is built.

resolve_layout (mesh.py: products) → check_layout → process group, meshes, model

A rule is a test of one key's value, with the text of its error. If a key has several rules, the nearest values that an
error suggests satisfy all of them.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from steptron.config.layouts import by_layout, ranks_of_stages
from steptron.config.schema import ModelConfig, PipelineConfig, Recipe, StageConfig, layer_kinds
from steptron.errors import MeshError, nearest_numbers
from steptron.parallel.mesh import Layout, recipe_key, resolve_layout
from steptron.parallel.pipeline_split import num_stages
from steptron.parallel.rules_deepspeed import check_deepspeed
from steptron.torch_internals import SHARDS_BY_PARAMETER

ENDS = "the output matrix, and a block and an output matrix for each MTP head"
"""The units behind the layers, each of which can be a pipeline stage of its own."""


class Rule(NamedTuple):
    """A test of a value, and the text of the error for a value that fails it."""

    holds: Callable[[int], bool]
    broken: str


def layouts_of(recipe: Recipe, ranks: int) -> list[Layout]:
    """Return the checked layout of each part of the recipe (`by_layout`). `ranks`: the number of ranks of the first
    stage, if it has none of its own.

    Raises `MeshError` if a part cannot have its layout.
    """
    layouts: list[Layout] = []
    counts = ranks_of_stages(recipe, ranks)
    for part in by_layout(recipe):
        try:
            layouts.append(resolve_layout(part.parallel, counts[next(iter(part.stages))]))
            check_layout(part, layouts[-1])
        except MeshError as error:
            own = [name for name in part.stages if recipe.stages[name].parallel is not None]
            raise (MeshError(f"stages.{own[0]}, which has its own layout: {error}") if own else error) from error
    return layouts


def check_layout(recipe: Recipe, layout: Layout) -> None:
    """Raise `MeshError` at the first broken rule; it names the key, value, rule and nearest legal values."""
    ranks = layout.world_size // layout.dense["pp"]
    model = recipe.model
    _check_axis("tp", layout.dense, _tensor_rules(model), ranks)
    if model.num_dense_layers < model.num_layers:
        view = layout.expert
        _check_axis("ep", view, [_divides("model.moe.num_experts", model.moe.num_experts)], ranks)
        _check_axis("etp", view, [_divides("model.moe.ffn_size", model.moe.ffn_size)], ranks)
        _check_axis("edp_shard", view, [_expert_shard_rule(model, view["ep"], view["etp"])], ranks)
    _check_stages_of_pipeline(model, recipe.parallel.pipeline, layout)
    for name, stage in recipe.stages.items():
        _check_sequence(f"stages.{name}", stage, model, layout)
        _check_batches(f"stages.{name}", stage, recipe.parallel.pipeline, layout)
    if recipe.engine == "deepspeed":
        check_deepspeed(recipe.deepspeed.zero, layout)
    else:
        check_fsdp(layout)


def check_fsdp(layout: Layout) -> None:
    """Raise `MeshError` if a layout shards parameters of one layer over different ranks and this torch cannot."""
    dense, expert = layout.dense, layout.expert
    differs = {
        "tp": dense["tp"] > 1,
        "ep": expert["ep"] > 1,
        "etp": expert["etp"] > 1,
        "edp_replicate": dense["dp_replicate"] != expert["edp_replicate"],
    }
    axis = next((axis for axis, of_layer in differs.items() if of_layer), None)
    if axis is not None and not SHARDS_BY_PARAMETER:
        key = f"{recipe_key(axis)}={(dense | expert)[axis]}"
        raise MeshError(
            f"{key} shards parameters of one layer over different ranks, which torch {torch.__version__} cannot do; "
            "install torch 2.12 or later, or give both views the same data-parallel axes and no others but pp and cp"
        )


def _tensor_rules(model: ModelConfig) -> list[Rule]:
    kinds = set(layer_kinds(model)) | ({"S"} if model.num_mtp_heads else set())
    rules = []
    for kind, name, attention in (("F", "full", model.full), ("S", "sliding", model.sliding)):
        if kind in kinds:
            rules += [
                _divides(f"model.{name}.num_heads", attention.num_heads),
                _divides_or_multiple(f"model.{name}.num_kv_heads", attention.num_kv_heads),
            ]
    if model.num_dense_layers or model.num_mtp_heads:
        rules.append(_divides("model.ffn_size", model.ffn_size))
    return [*rules, _divides("model.vocab_size", model.vocab_size)]


def _divides(key: str, whole: int) -> Rule:
    return Rule(lambda value: whole % value == 0, f"does not divide {key}={whole}")


def _divides_or_multiple(key: str, heads: int) -> Rule:
    """Return the rule of KV heads: ranks share them out, or several ranks hold the same head."""
    broken = f"does not divide {key}={heads} and is not a multiple of it"
    return Rule(lambda value: heads % value == 0 or value % heads == 0, broken)


def _expert_shard_rule(model: ModelConfig, ep: int, etp: int) -> Rule:
    """Return the rule for shards of experts: complete experts on each rank, or every expert split along dim 1.

    Dim 1 is I of gate and up [E, I, D], and D of down [E, D, I].
    """
    experts, columns = model.moe.num_experts // ep, model.moe.ffn_size // etp
    broken = (
        f"divides neither model.moe.num_experts / parallel.expert.ep = {experts} (complete experts on a rank) "
        f"nor both model.hidden_size={model.hidden_size} and model.moe.ffn_size / parallel.expert.etp = {columns} "
        "(split experts); "
        "parallel.expert.dp_replicate can take the rest"
    )
    return Rule(lambda value: experts % value == 0 or (model.hidden_size % value == 0 and columns % value == 0), broken)


def _check_axis(axis: str, view: Mapping[str, int], rules: list[Rule], ranks: int) -> None:
    """Check the rules of an axis whose size divides `ranks`, the number of ranks of a pipeline stage."""
    value = view[axis]
    for rule in rules:
        if not rule.holds(value):
            legal = [n for n in range(1, ranks + 1) if ranks % n == 0 and all(r.holds(n) for r in rules)]
            raise MeshError(f"{recipe_key(axis)}={value} {rule.broken}; {nearest_numbers(value, legal)}")


def _check_stages_of_pipeline(model: ModelConfig, pipeline: PipelineConfig, layout: Layout) -> None:
    pp, written, layers = layout.dense["pp"], pipeline.layers, model.num_layers
    stages, ends = num_stages(pipeline, pp), 1 + 2 * model.num_mtp_heads
    most = layers + ends
    if stages > most:
        legal = [
            n for n in range(1, layout.world_size + 1) if layout.world_size % n == 0 and num_stages(pipeline, n) <= most
        ]
        raise MeshError(
            f"parallel.pp={pp} with parallel.pipeline.schedule={pipeline.schedule} makes {stages} stages, more than "
            f"model.num_layers={layers} and the {ends} ends behind them ({ENDS}); {nearest_numbers(pp, legal)}"
        )
    if not written:
        return
    key = f"parallel.pipeline.layers={list(written)}"
    if pp == 1:
        raise MeshError(f"{key} has no effect with parallel.pp=1; leave it empty, or increase parallel.pp")
    even = [layers // stages + (i < layers % stages) for i in range(stages)]
    if len(written) != stages:
        raise MeshError(
            f"{key} has {len(written)} entries, but parallel.pp={pp} with parallel.pipeline.schedule="
            f"{pipeline.schedule} makes {stages} stages; set {even}, or leave it empty"
        )
    if min(written) < 0:
        raise MeshError(f"{key}: a stage cannot have less than 0 layers; set {even}, or leave it empty")
    if sum(written) != layers:
        raise MeshError(
            f"{key} sums to {sum(written)}, not to model.num_layers={layers}; set {even}, or leave it empty"
        )
    last = max(stage for stage, count in enumerate(written) if count)
    empty = next((stage for stage in range(1, last) if not written[stage]), None)
    if empty is not None:
        raise MeshError(
            f"{key}: stage {empty + 1} has 0 layers, and stages behind it have some; only the first stage, with the "
            f"embedding, and the last ones, with the ends ({ENDS}), may have none; set {even}, or leave it empty"
        )
    if stages - 1 - last > ends:
        raise MeshError(
            f"{key}: {stages - 1 - last} stages have 0 layers at the end, but only {ends} ends are there for them "
            f"({ENDS}); set {even}, or leave it empty"
        )


def _check_sequence(path: str, stage: StageConfig, model: ModelConfig, layout: Layout) -> None:
    """Check the sequence length: cp splits it into equal chunks, two per rank, and tp splits a rank's tokens."""
    cp, tp = layout.dense["cp"], layout.dense["tp"]
    unit, words = cp * tp, f"parallel.dense.cp × parallel.dense.tp = {cp} × {tp}"
    if cp > 1 and stage.seq_len % (2 * cp):
        unit, words = 2 * cp, f"2 × parallel.dense.cp = 2 × {cp}"
    if stage.seq_len % unit:
        step = math.lcm(2 * cp if cp > 1 else 1, cp * tp)
        legal = range(step, model.max_positions + 1, step)
        raise MeshError(
            f"{path}.seq_len={stage.seq_len} is not divisible by {words}; {nearest_numbers(stage.seq_len, legal)}"
        )


def _check_batches(path: str, stage: StageConfig, pipeline: PipelineConfig, layout: Layout) -> None:
    unit = stage.micro_batch * layout.data_ranks
    rule = _micro_batches_rule(pipeline, layout.dense["pp"])
    sizes = {f"{path}.ramp.{i}": step.batch_size for i, step in enumerate(stage.ramp)} | {path: stage.batch_size}
    for key, size in sizes.items():
        # The legal sizes of any schedule are at most this many micro-batches apart.
        furthest = size // unit + 2 * num_stages(pipeline, layout.dense["pp"]) + 1
        legal = [n * unit for n in range(1, furthest + 1) if rule.holds(n)]
        if size % unit:
            raise MeshError(
                f"{key}.batch_size={size} is not divisible by {path}.micro_batch × data-parallel ranks = "
                f"{stage.micro_batch} × {layout.data_ranks} = {unit}; {nearest_numbers(size, legal)}"
            )
        if not rule.holds(size // unit):
            raise MeshError(
                f"{key}.batch_size={size} makes {size // unit} micro-batches of "
                f"{stage.micro_batch} × {layout.data_ranks} sequences, but {rule.broken}; "
                f"{nearest_numbers(size, legal)}"
            )


def _micro_batches_rule(pipeline: PipelineConfig, pp: int) -> Rule:
    """Return the rule that torch.distributed.pipelining's schedules set for the number of micro-batches per step.

    1f1b has no rule: with fewer micro-batches than stages, `pp.py` uses GPipe, whose order is then the same.
    """
    stages = num_stages(pipeline, pp)
    key = f"parallel.pipeline.schedule={pipeline.schedule}"
    if pp > 1 and pipeline.schedule == "dualpipe-v":
        return Rule(lambda n: n >= stages, f"{key} needs at least one per stage = {stages}")
    if pp > 1 and pipeline.schedule == "interleaved":
        return Rule(
            lambda n: n % max(1, n // pp) == 0,
            f"{key} works in equal rounds of at least parallel.pp={pp} micro-batches",
        )
    return Rule(lambda n: True, "")
