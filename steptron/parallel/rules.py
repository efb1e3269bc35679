"""What a layout asks of the model and of the stages, checked before anything is built.

resolve_layout (mesh.py: products) → check_layout → process group, meshes, model

A rule is a test of one key's value with the words for it. A key can be under several rules, and the values that an error names as
nearest keep all of them.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from steptron.config.schema import ModelConfig, PipelineConfig, Recipe, StageConfig, layer_kinds
from steptron.errors import MeshError
from steptron.parallel.mesh import Layout
from steptron.parallel.pipeline_split import num_stages
from steptron.parallel.rules_deepspeed import check_deepspeed


class Rule(NamedTuple):
    """What a value must keep, and what an error says of one that does not."""

    holds: Callable[[int], bool]
    broken: str


def check_layout(recipe: Recipe, layout: Layout) -> None:
    """Raise `MeshError` at the first rule broken: key, value, rule, nearest legal values."""
    ranks = layout.world_size // layout.dense["pp"]
    model = recipe.model
    _check_axis("parallel.dense.tp", layout.dense["tp"], _tensor_rules(model), ranks)
    if model.num_dense_layers < model.num_layers:
        ep, etp, shard = layout.expert["ep"], layout.expert["etp"], layout.expert["edp_shard"]
        _check_axis("parallel.expert.ep", ep, [_divides("model.moe.num_experts", model.moe.num_experts)], ranks)
        _check_axis("parallel.expert.etp", etp, [_divides("model.moe.ffn_size", model.moe.ffn_size)], ranks)
        _check_axis("parallel.expert.dp_shard", shard, [_expert_shard_rule(model, ep, etp)], ranks)
    _check_stages_of_pipeline(model, recipe.parallel.pipeline, layout)
    for name, stage in recipe.stages.items():
        _check_sequence(f"stages.{name}", stage, model, layout)
        _check_batches(f"stages.{name}", stage, recipe.parallel.pipeline, layout)
    if recipe.engine == "deepspeed":
        check_deepspeed(recipe, layout)


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
    """KV heads are dealt out; where there are fewer of them than ranks, each is kept by several."""
    broken = f"does not divide {key}={heads} and is no multiple of it"
    return Rule(lambda value: heads % value == 0 or value % heads == 0, broken)


def _expert_shard_rule(model: ModelConfig, ep: int, etp: int) -> Rule:
    """Whole experts on a rank, or else every expert cut along dim 1: gate and up [E, I, D] in I, down [E, D, I] in D."""
    experts, columns = model.moe.num_experts // ep, model.moe.ffn_size // etp
    broken = (
        f"divides neither model.moe.num_experts / parallel.expert.ep = {experts} (whole experts on a rank) nor both "
        f"model.hidden_size={model.hidden_size} and model.moe.ffn_size / parallel.expert.etp = {columns} (cut experts); "
        "parallel.expert.dp_replicate can take the rest"
    )
    return Rule(lambda value: experts % value == 0 or (model.hidden_size % value == 0 and columns % value == 0), broken)


def _check_axis(key: str, value: int, rules: list[Rule], ranks: int) -> None:
    """`ranks`: how many a pipeline stage has; an axis divides them."""
    for rule in rules:
        if not rule.holds(value):
            legal = [n for n in range(1, ranks + 1) if ranks % n == 0 and all(r.holds(n) for r in rules)]
            raise MeshError(f"{key}={value} {rule.broken}; {_nearest(value, legal)}")


def _check_stages_of_pipeline(model: ModelConfig, pipeline: PipelineConfig, layout: Layout) -> None:
    pp, written, layers = layout.dense["pp"], pipeline.layers, model.num_layers
    stages = num_stages(pipeline, pp)
    if stages > layers:
        legal = [
            n
            for n in range(1, layout.world_size + 1)
            if layout.world_size % n == 0 and num_stages(pipeline, n) <= layers
        ]
        raise MeshError(
            f"parallel.pp={pp} with parallel.pipeline.schedule={pipeline.schedule} makes {stages} stages, more than "
            f"model.num_layers={layers} (each holds at least one layer); {_nearest(pp, legal)}"
        )
    if not written:
        return
    key = f"parallel.pipeline.layers={list(written)}"
    if pp == 1:
        raise MeshError(f"{key} has no meaning with parallel.pp=1; leave it empty, or raise parallel.pp")
    even = [layers // stages + (i < layers % stages) for i in range(stages)]
    if len(written) != stages:
        raise MeshError(
            f"{key} has {len(written)} entries, but parallel.pp={pp} with parallel.pipeline.schedule="
            f"{pipeline.schedule} makes {stages} stages; such as {even}, or leave it empty"
        )
    if min(written) < 1:
        raise MeshError(f"{key}: each stage holds at least one layer; such as {even}, or leave it empty")
    if sum(written) != layers:
        raise MeshError(
            f"{key} sums to {sum(written)}, not to model.num_layers={layers}; such as {even}, or leave it empty"
        )


def _check_sequence(path: str, stage: StageConfig, model: ModelConfig, layout: Layout) -> None:
    """Each cp rank takes a piece of the sequence's head and one of its tail; its tokens are dealt out over tp."""
    cp, tp = layout.dense["cp"], layout.dense["tp"]
    unit, words = cp * tp, f"parallel.dense.cp × parallel.dense.tp = {cp} × {tp}"
    if cp > 1 and stage.seq_len % (2 * cp):
        unit, words = 2 * cp, f"2 × parallel.dense.cp = 2 × {cp}"
    if stage.seq_len % unit:
        step = math.lcm(2 * cp if cp > 1 else 1, cp * tp)
        legal = range(step, model.max_positions + 1, step)
        raise MeshError(f"{path}.seq_len={stage.seq_len} is not divisible by {words}; {_nearest(stage.seq_len, legal)}")


def _check_batches(path: str, stage: StageConfig, pipeline: PipelineConfig, layout: Layout) -> None:
    unit = stage.micro_batch * layout.data_ranks
    rule = _micro_batches_rule(pipeline, layout.dense["pp"])
    sizes = {f"{path}.ramp.{i}": step.batch_size for i, step in enumerate(stage.ramp)} | {path: stage.batch_size}
    for key, size in sizes.items():
        # No schedule's demand has gaps longer than this many micro-batches.
        furthest = size // unit + 2 * num_stages(pipeline, layout.dense["pp"]) + 1
        legal = [n * unit for n in range(1, furthest + 1) if rule.holds(n)]
        if size % unit:
            raise MeshError(
                f"{key}.batch_size={size} is not divisible by {path}.micro_batch × data-parallel ranks = "
                f"{stage.micro_batch} × {layout.data_ranks} = {unit}; {_nearest(size, legal)}"
            )
        if not rule.holds(size // unit):
            raise MeshError(
                f"{key}.batch_size={size} makes {size // unit} micro-batches of {stage.micro_batch} × {layout.data_ranks} "
                f"sequences, but {rule.broken}; {_nearest(size, legal)}"
            )


def _micro_batches_rule(pipeline: PipelineConfig, pp: int) -> Rule:
    """What the schedules of torch.distributed.pipelining demand of the number of micro-batches a step.

    1f1b demands nothing: with fewer of them than stages, `pp.py` takes GPipe's order, which is the same then."""
    stages = num_stages(pipeline, pp)
    key = f"parallel.pipeline.schedule={pipeline.schedule}"
    if pp > 1 and pipeline.schedule == "dualpipe-v":
        return Rule(lambda n: n >= stages, f"{key} needs at least one a stage = {stages}")
    if pp > 1 and pipeline.schedule == "interleaved":
        return Rule(
            lambda n: n % max(1, n // pp) == 0,
            f"{key} works in rounds of at least parallel.pp={pp} of them, as many in each",
        )
    return Rule(lambda n: True, "")


def _nearest(value: int, legal: Iterable[int]) -> str:
    """The legal values next to `value`, one on each side."""
    legal = list(legal)
    near = [n for n in legal if n < value][-1:] + [n for n in legal if n > value][:1]
    return f"nearest: {', '.join(map(str, near))}" if near else "there is no legal value"
