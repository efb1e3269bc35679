"""Rules that types cannot express: ranges of single values, and constraints between the sections of a recipe.

Nothing here depends on the number of ranks; parallel/mesh.py checks that. Every function raises `RecipeError` at the
first broken rule, with the key, its value, the rule and the way out.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from steptron.config.changes import UNSET_CHUNK
from steptron.config.decode import join
from steptron.config.kernels import KernelsConfig
from steptron.config.ranges import AXIS, BETA, COUNT, NOT_NEGATIVE, POSITIVE, SHARE, Range
from steptron.config.schema import (
    AttentionConfig,
    BalanceConfig,
    CheckpointConfig,
    DataConfig,
    DenseMeshConfig,
    EvaluationConfig,
    ExpertMeshConfig,
    LimitsConfig,
    LrConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    ParallelConfig,
    PipelineConfig,
    RampStep,
    Recipe,
    RecomputeConfig,
    RopeScalingConfig,
    RunConfig,
    StageConfig,
    layer_kinds,
    trained_heads,
)
from steptron.config.validate_monitoring import MONITOR_RANGES, validate_monitoring
from steptron.errors import RecipeError, nearest, nearest_numbers

_MESH_AXES = {"dp_replicate": AXIS, "dp_shard": AXIS, "cp": AXIS, "tp": AXIS, "ep": AXIS, "etp": AXIS}

RANGES: dict[type, dict[str, Range]] = {
    Recipe: {"seed": NOT_NEGATIVE},
    RunConfig: {"timeout_s": POSITIVE},
    ModelConfig: {
        **dict.fromkeys(("vocab_size", "hidden_size", "num_layers", "head_dim", "ffn_size"), COUNT),
        **dict.fromkeys(("max_positions", "loss_chunk"), COUNT),
        **dict.fromkeys(("num_dense_layers", "num_mtp_heads"), NOT_NEGATIVE),
        **dict.fromkeys(("norm_eps", "init_std"), POSITIVE),
    },
    AttentionConfig: {"num_heads": COUNT, "num_kv_heads": COUNT, "rotary_share": SHARE, "window": COUNT},
    RopeScalingConfig: {
        "factor": Range(at_least=1),
        "original_max_positions": COUNT,
        "low_freq_factor": POSITIVE,
        "high_freq_factor": POSITIVE,
    },
    MoeConfig: {
        **dict.fromkeys(("num_experts", "top_k", "ffn_size", "shared_ffn_size"), COUNT),
        **dict.fromkeys(("route_groups", "route_top_groups"), COUNT),
        "scaling_factor": POSITIVE,
    },
    StageConfig: {
        "mtp_heads": COUNT,
        **dict.fromkeys(("tokens", "schedule_tokens", "seq_len", "batch_size", "micro_batch"), COUNT),
        **dict.fromkeys(("rope_theta_full", "rope_theta_sliding"), Range(above=1)),
        "mtp_weight": NOT_NEGATIVE,
        "mix": NOT_NEGATIVE,
        **dict.fromkeys(("min_length", "max_length"), COUNT),
    },
    DataConfig: {"metadata_until": NOT_NEGATIVE},
    EvaluationConfig: {"every": COUNT, "tokens": COUNT},
    RampStep: {"until": COUNT, "batch_size": COUNT},
    LrConfig: dict.fromkeys(("peak", "start", "end"), NOT_NEGATIVE),
    BalanceConfig: {
        **dict.fromkeys(("bias_rate", "bias_rate_end", "ep_loss", "sequence_loss", "z_loss"), NOT_NEGATIVE),
        "num_groups": COUNT,
    },
    LimitsConfig: {"routed": POSITIVE, "shared": POSITIVE},
    ParallelConfig: {"ranks": COUNT, "pp": AXIS},
    PipelineConfig: {"chunks": Range(at_least=2)},
    RecomputeConfig: {"every": COUNT},
    DenseMeshConfig: _MESH_AXES,
    ExpertMeshConfig: _MESH_AXES,
    KernelsConfig: {"capacity": Range(at_least=1)},
    OptimConfig: {
        **dict.fromkeys(("beta1", "beta2", "momentum"), BETA),
        **dict.fromkeys(("eps", "clip_norm"), POSITIVE),
        "weight_decay": NOT_NEGATIVE,
    },
    CheckpointConfig: {"every": COUNT, "keep": COUNT, "keep_every": COUNT, "timeout_s": POSITIVE},
    **MONITOR_RANGES,
}
"""The ranges by dataclass and field. For a mapping it is the range of the values."""


def validate(recipe: Recipe) -> None:
    """Check every rule that needs neither ranks nor data."""
    for key, value, bounds in _bounded(recipe, ""):
        if not bounds.holds(value):
            raise RecipeError(f"{key}={value} must be {bounds.rule()}")
    if not recipe.run.name or "/" in recipe.run.name or recipe.run.name.startswith("."):
        raise RecipeError(f"run.name={recipe.run.name} must be a plain folder name; put a path into run.dir")
    _validate_model(recipe.model)
    if not recipe.data.sources:
        raise RecipeError("data.sources is empty; name at least one source")
    for i, pair in enumerate(recipe.data.skip):
        if len(pair) != 2 or not 1 <= pair[0] <= pair[1]:
            raise RecipeError(
                f"data.skip.{i}={list(pair)} must be the first and the last step of a range, from step 1 on, such as "
                "data.skip=[[120,125]]"
            )
    if not recipe.stages:
        raise RecipeError("stages is empty; a run needs at least one stage")
    for name, stage in recipe.stages.items():
        _validate_stage(join("stages", name), stage, recipe)
    if recipe.run.deterministic and recipe.kernels.experts == "transformer_engine":
        raise RecipeError(
            "run.deterministic=true and kernels.experts=transformer_engine: it multiplies on several CUDA streams, for "
            "which cuBLAS promises no equal bits; choose another back end, or set run.deterministic=false"
        )
    _validate_mtp_heads(recipe)
    if recipe.checkpoint.keep_best:
        _validate_keep_best(recipe)
    if recipe.engine == "deepspeed":
        _validate_deepspeed(recipe)
    validate_monitoring(recipe.monitor, recipe.run.name)


def validate_new(recipe: Recipe) -> None:
    """Check the rules that came after runs which break them, and which can still be continued."""
    chunk, tokens = recipe.model.loss_chunk, max(s.micro_batch * s.seq_len for s in recipe.stages.values())
    if chunk != "auto" and chunk > max(tokens, UNSET_CHUNK):
        raise RecipeError(
            f"model.loss_chunk={chunk} is more than the {tokens} tokens of the largest micro-batch "
            f"(micro_batch × seq_len); set at most {tokens}, or auto"
        )


def _bounded(section: object, path: str) -> Iterator[tuple[str, float, Range]]:
    """Yield key, value and range of every number in `section` that has a range."""
    if isinstance(section, Mapping):
        for name, item in section.items():
            yield from _bounded(item, join(path, name))
    elif isinstance(section, tuple):
        for i, item in enumerate(section):
            yield from _bounded(item, join(path, i))
    elif dataclasses.is_dataclass(section):
        ranges = RANGES.get(type(section), {})
        for field in dataclasses.fields(section):
            key, value = join(path, field.name), getattr(section, field.name)
            if field.name not in ranges or value is None or isinstance(value, str):
                yield from _bounded(value, key)
            elif isinstance(value, Mapping):
                yield from ((join(key, name), item, ranges[field.name]) for name, item in value.items())
            else:
                yield key, value, ranges[field.name]


def _validate_model(model: ModelConfig) -> None:
    pattern = model.layer_pattern
    if not pattern or set(pattern) - set("FS"):
        raise RecipeError(f"model.layer_pattern={pattern} must consist of F (full) and S (sliding), such as FSSS")
    for kind, attention in (("full", model.full), ("sliding", model.sliding)):
        _validate_attention(f"model.{kind}", attention, model.head_dim)
    if model.full.window is not None:
        raise RecipeError(
            f"model.full.window={model.full.window}: full layers see all earlier tokens; set it to null or use S layers"
        )
    if model.sliding.window is None:
        raise RecipeError("model.sliding.window is not set; sliding layers need a number of keys, such as 512")
    if model.num_dense_layers > model.num_layers:
        raise RecipeError(
            f"model.num_dense_layers={model.num_dense_layers} must be at most model.num_layers={model.num_layers}"
        )
    if model.moe.top_k > model.moe.num_experts:
        raise RecipeError(
            f"model.moe.top_k={model.moe.top_k} must be at most model.moe.num_experts={model.moe.num_experts}"
        )
    _validate_route_groups(model.moe)
    if model.rope_scaling is not None:
        _validate_rope_scaling(model.rope_scaling, model.max_positions)


def _validate_mtp_heads(recipe: Recipe) -> None:
    there, before, earlier = recipe.model.num_mtp_heads, 0, ""
    for name, stage in recipe.stages.items():
        key = f"{join('stages', name)}.mtp_heads={stage.mtp_heads}"
        if stage.mtp_heads is not None and stage.mtp_heads > there:
            raise RecipeError(f"{key} must be at most model.num_mtp_heads={there}")
        trained = trained_heads(recipe.model, stage)
        if trained < before:
            raise RecipeError(
                f"{key} is less than the {before} of stage {earlier}, and the other heads would fall behind the "
                f"network; set it to {before} or more"
            )
        before, earlier = trained, name


def _validate_keep_best(recipe: Recipe) -> None:
    evaluation, every = recipe.evaluation, recipe.checkpoint.every
    if not evaluation.sources:
        raise RecipeError(
            "checkpoint.keep_best=true needs an evaluation loss, and evaluation.sources is empty; name a held-out "
            "source there, or set checkpoint.keep_best to false"
        )
    if every % evaluation.every:
        raise RecipeError(
            "checkpoint.keep_best=true needs an evaluation at each checkpoint, and "
            f"evaluation.every={evaluation.every} does not divide checkpoint.every={every}; "
            f"{nearest_numbers(evaluation.every, _divisors(every))}"
        )


def _validate_deepspeed(recipe: Recipe) -> None:
    zero = recipe.deepspeed.zero
    own = next((name for name, stage in recipe.stages.items() if stage.parallel is not None), None)
    if own is not None:
        raise RecipeError(
            f"stages.{own}.parallel needs a network that is built again in the same processes, and engine=deepspeed "
            "cannot; leave it out, or set engine=native"
        )
    if recipe.optim.matrix_optimizer == "muon":
        raise RecipeError(
            "optim.matrix_optimizer=muon needs whole matrices, and engine=deepspeed shards them at arbitrary places; "
            "set optim.matrix_optimizer=adamw, or engine=native"
        )
    if recipe.parallel.compile:
        raise RecipeError(
            "parallel.compile=true does not work with engine=deepspeed, which exchanges parameters "
            "inside the compiled blocks; set it to false, or engine=native"
        )
    if zero == 3 and "norm" in recipe.parallel.recompute.parts:
        raise RecipeError(
            "parallel.recompute.parts has norm, which needs the weights of norms "
            "after deepspeed.zero=3 has released them; leave norm out, set deepspeed.zero to 1 or 2, or engine=native"
        )
    if recipe.precision == "bf16" and zero == 1:
        raise RecipeError(
            "precision=bf16 with engine=deepspeed and deepspeed.zero=1 uses an optimizer of DeepSpeed that this engine "
            "does not support; set deepspeed.zero to 2 or 3, precision=fp32, or engine=native"
        )


def _validate_route_groups(moe: MoeConfig) -> None:
    groups, top, path = moe.route_groups, moe.route_top_groups, "model.moe.route_groups"
    if moe.num_experts % groups:
        raise RecipeError(
            f"{path}={groups} does not divide model.moe.num_experts={moe.num_experts}; "
            f"{nearest_numbers(groups, _divisors(moe.num_experts))}"
        )
    if top > groups:
        raise RecipeError(f"model.moe.route_top_groups={top} must be at most {path}={groups}")
    if moe.top_k > top * (moe.num_experts // groups):
        raise RecipeError(
            f"model.moe.top_k={moe.top_k} experts do not fit into model.moe.route_top_groups={top} groups of "
            f"{moe.num_experts // groups}; allow more groups, or set {path}=1 to choose among all experts"
        )


def _validate_attention(path: str, attention: AttentionConfig, head_dim: int) -> None:
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    if heads % kv_heads:
        raise RecipeError(
            f"{path}.num_heads={heads} is not divisible by {path}.num_kv_heads={kv_heads}; "
            f"{nearest_numbers(heads, _multiples(kv_heads, heads))}"
        )
    rotated, shares = attention.rotary_share * head_dim, [n / head_dim for n in range(2, head_dim + 1, 2)]
    if rotated != int(rotated) or int(rotated) % 2:
        raise RecipeError(
            f"{path}.rotary_share={attention.rotary_share} of model.head_dim={head_dim} is {rotated:g} channels; "
            f"it must be an even number of them; {nearest_numbers(attention.rotary_share, shares)}"
        )


def _validate_rope_scaling(scaling: RopeScalingConfig, max_positions: int) -> None:
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise RecipeError(
            f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor} must be below "
            f"model.rope_scaling.high_freq_factor={scaling.high_freq_factor}"
        )
    reach = int(scaling.factor * scaling.original_max_positions)
    if max_positions > reach:
        raise RecipeError(
            f"model.max_positions={max_positions} is beyond model.rope_scaling.factor × "
            f"model.rope_scaling.original_max_positions = {reach}; lower it, or raise the factor"
        )


def _validate_stage(path: str, stage: StageConfig, recipe: Recipe) -> None:
    model = recipe.model
    if stage.seq_len > model.max_positions:
        raise RecipeError(
            f"{path}.seq_len={stage.seq_len} is longer than the RoPE range, model.max_positions={model.max_positions}; "
            "shorten the stage, or raise model.max_positions"
        )
    _validate_batches(path, stage)
    for name in stage.mix:
        if name not in recipe.data.sources:
            raise RecipeError(f"{path}.mix.{name}: data.sources has no '{name}'; {nearest(name, recipe.data.sources)}")
    if not sum(stage.mix.values()) > 0:
        raise RecipeError(f"{path}.mix has no source with a weight above 0; known: {', '.join(recipe.data.sources)}")
    for key, limits in (("min_length", stage.min_length), ("max_length", stage.max_length)):
        for name, limit in limits.items():
            if not stage.mix.get(name):
                raise RecipeError(
                    f"{path}.{key}.{name}={limit}: the stage does not draw from '{name}'; {nearest(name, stage.mix)}"
                )
            if stage.min_length.get(name, 1) > stage.max_length.get(name, limit):
                raise RecipeError(
                    f"{path}.min_length.{name}={stage.min_length[name]} must be at most "
                    f"{path}.max_length.{name}={stage.max_length[name]}"
                )
    _validate_lr(path, stage)
    if stage.mtp_weight > 0 and model.num_mtp_heads == 0:
        raise RecipeError(f"{path}.mtp_weight={stage.mtp_weight} but model.num_mtp_heads=0; set it to 0, or add heads")
    _validate_balance(f"{path}.balance", stage.balance, model.moe.num_experts)
    for kind, limits in (("routed", stage.limits.routed), ("shared", stage.limits.shared)):
        for layer in limits:
            if not model.num_dense_layers <= layer < model.num_layers:
                raise RecipeError(
                    f"{path}.limits.{kind}.{layer}: layer {layer} is not a MoE layer; they are {_moe_layers(model)}"
                )


def _validate_batches(path: str, stage: StageConfig) -> None:
    keys = [f"{path}.ramp.{i}" for i in range(len(stage.ramp))]
    for key, size in [(path, stage.batch_size)] + [(k, s.batch_size) for k, s in zip(keys, stage.ramp, strict=True)]:
        if size % stage.micro_batch:
            raise RecipeError(
                f"{key}.batch_size={size} is not divisible by {path}.micro_batch={stage.micro_batch}; "
                f"{nearest_numbers(size, _multiples(stage.micro_batch, size))}"
            )
    until, size = 0, 0
    for key, step in zip(keys, stage.ramp, strict=True):
        if step.until <= until:
            raise RecipeError(
                f"{key}.until={step.until} must be above the step before, {until}; a ramp is in order of tokens"
            )
        if step.batch_size <= size:
            raise RecipeError(
                f"{key}.batch_size={step.batch_size} must be above the step before, {size}; a ramp goes up"
            )
        until, size = step.until, step.batch_size
    if until > stage.tokens:
        raise RecipeError(f"{keys[-1]}.until={until} is beyond the stage's end, {path}.tokens={stage.tokens}")
    if size >= stage.batch_size and stage.ramp:
        raise RecipeError(
            f"{keys[-1]}.batch_size={size} must be below {path}.batch_size={stage.batch_size}, where the ramp leads to"
        )


def _validate_lr(stage_path: str, stage: StageConfig) -> None:
    lr, path = stage.lr, f"{stage_path}.lr"
    budget = "tokens" if stage.schedule_tokens is None else "schedule_tokens"
    falls = lr.kind in ("linear", "cosine", "wsd")
    if falls and lr.end is None:
        raise RecipeError(f"{path}.end is not set; {path}.kind={lr.kind} needs the learning rate at the stage's end")
    if not falls and lr.end is not None:
        raise RecipeError(
            f"{path}.end={lr.end} has no meaning with {path}.kind={lr.kind}; set it to null, or choose cosine"
        )
    if lr.kind == "wsd" and lr.decay == 0:
        raise RecipeError(f"{path}.decay is not set; {path}.kind=wsd needs the tokens of the final fall")
    if lr.kind != "wsd" and lr.decay:
        raise RecipeError(
            f"{path}.decay={lr.decay} has no meaning with {path}.kind={lr.kind}; set it to 0, or choose wsd"
        )
    if lr.start and not lr.warmup:
        raise RecipeError(
            f"{path}.start={lr.start} has no meaning without warm-up; set it to 0, or {path}.warmup above 0"
        )
    # A fall needs at least a token of its own; that of wsd is `decay`.
    needed = lr.warmup + lr.decay + (1 if lr.kind in ("linear", "cosine") else 0)
    if needed > getattr(stage, budget):
        written = f"{path}.warmup={lr.warmup}" + (f" and {path}.decay={lr.decay} do" if lr.decay else " does")
        raise RecipeError(
            f"{written} not fit into {stage_path}.{budget}={getattr(stage, budget)}; shorten it, or raise "
            f"{stage_path}.{budget}"
        )


def _validate_balance(path: str, balance: BalanceConfig, num_experts: int) -> None:
    if balance.num_groups is not None and num_experts % balance.num_groups:
        raise RecipeError(
            f"{path}.num_groups={balance.num_groups} does not divide model.moe.num_experts={num_experts}; "
            f"{nearest_numbers(balance.num_groups, _divisors(num_experts))}"
        )
    if balance.freeze_router and (balance.bias_rate or balance.bias_rate_end):
        raise RecipeError(
            f"{path}.bias_rate={balance.bias_rate} has no effect with {path}.freeze_router=true; "
            "set the rates to 0, or freeze_router to false"
        )


def _moe_layers(model: ModelConfig) -> str:
    if model.num_dense_layers == model.num_layers:
        return "none, all layers are dense"
    return f"{model.num_dense_layers} to {len(layer_kinds(model)) - 1}"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _multiples(unit: int, value: int) -> range:
    """Return the multiples of `unit` up to the one after `value`."""
    return range(unit, value + unit + 1, unit)
