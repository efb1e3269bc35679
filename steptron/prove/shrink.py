"""The user's recipe, made small enough for a few CPU processes, with everything kept that a layout can trip over.

    recipe, stage, ranks ─► layout.py: mesh ─┐
                                             ├─► Small: recipe of the proof, second layout, what was changed and why
    model, stage ─ sizes that fit the mesh ──┘

Kept: the attention kinds' order and ratio of heads, leading dense layers, chained MTP heads, KV heads fewer than tp or
more, experts that divide by the shards or not, whether layers divide by the stages, a window inside a piece of context
parallelism or beyond it, schedule, dispatch, context method, recomputation, the stage's losses, balance and frozen
router, the optimizer.

Legend of short names: G query heads a KV head, K KV heads, T tokens of a row.
"""

from dataclasses import dataclass, replace
from itertools import count as count_from
from math import ceil, gcd, lcm

from steptron.config.schema import (
    AttentionConfig,
    BalanceConfig,
    DenseMeshConfig,
    ExpertMeshConfig,
    LimitsConfig,
    LrConfig,
    ModelConfig,
    MoeConfig,
    ParallelConfig,
    PipelineConfig,
    Recipe,
    RopeScalingConfig,
    StageConfig,
    layer_kinds,
)
from steptron.errors import MeshError, RecipeError
from steptron.parallel.mesh import Layout, resolve_layout
from steptron.parallel.pipeline_split import num_stages
from steptron.parallel.rules import check_layout
from steptron.prove.layout import Fit, Sizes, as_parallel, asked_axes, fit

HIDDEN, HEAD_DIM, FFN, EXPERT_FFN, VOCAB = 32, 32, 48, 16, 96
"""The sizes of the small model, rounded up to multiples that the mesh divides."""

MIN_TOKENS = 32
"""The length of the shortest row."""

INIT_STD = 0.1
"""The standard deviation of initial values: with 0.02 a matrix of so few columns has little effect, with more the
rounding grows."""

MOST_MICRO_BATCHES = 256
"""The largest number of micro-batches that any schedule can require."""

LIMIT = 1.5
"""The activation limit of the small model. It clips few values, because a value near the limit may be rounded to its
other side."""


@dataclass(frozen=True, kw_only=True)
class Small:
    """The recipes that the proof runs."""

    asked: Sizes
    """The user's axes."""
    fit: Fit
    recipe: Recipe
    """The recipe with the layout of the proof, and one stage."""
    second: Recipe
    """A recipe with the layout that a checkpoint of the first is loaded into."""
    alone: Recipe
    """A recipe for one process."""
    changes: dict[str, tuple[object, object]]
    """The changes: key → the user's value and the proof's."""


def shrink(recipe: Recipe, ranks: int, world_size: int | None = None) -> Small:
    """Return the proof of a recipe's first stage on at most `ranks` ranks.

    `world_size`: number of ranks of the user's run, if axes depend on it. Raises `MeshError` or `RecipeError` if the
    recipe itself is wrong.
    """
    name = next(iter(recipe.stages))
    if recipe.engine != "native":
        raise RecipeError(f"engine={recipe.engine}: the proof is of native layouts; add engine=native")
    stage = recipe.stages[name]
    asked, layout = asked_axes(recipe.parallel, world_size)
    check_layout(replace(recipe, stages={name: stage}), layout)
    fitted = fit(asked, ranks)
    pipeline = _pipeline(recipe, asked, fitted.layout)
    model = _model(recipe, stage, asked, fitted.layout, pipeline)
    small_stage = _stage(recipe, stage, asked, fitted.layout, model, pipeline)
    parallel = replace(recipe.parallel, compile=False, pipeline=pipeline, **as_parallel(fitted.layout))
    small = replace(
        recipe,
        precision="fp32",
        model=model,
        stages={name: small_stage},
        parallel=parallel,
    )
    check_layout(small, fitted.layout)
    return Small(
        asked=asked,
        fit=fitted,
        recipe=small,
        second=_second(small, fitted.layout),
        alone=replace(small, parallel=ParallelConfig()),
        changes=_changes(recipe, small, name),
    )


def _pipeline(recipe: Recipe, asked: Sizes, layout: Layout) -> PipelineConfig:
    """Return the user's pipeline. Written lengths of stages become 1, 2 or 3, in the same order of size; 0 stays 0."""
    pipeline = recipe.parallel.pipeline
    stages = num_stages(pipeline, layout.dense["pp"])
    if not pipeline.layers or stages == 1:
        return replace(pipeline, layers=())
    written = [pipeline.layers[i * (len(pipeline.layers) - 1) // (stages - 1)] for i in range(stages)]
    order = sorted({0, *written})
    lengths = [min(order.index(n), 3) for n in written]
    while sum(lengths) < _fewest_layers(recipe.model):
        lengths = [n + (n > 0) for n in lengths]
    return replace(pipeline, layers=tuple(lengths))


def _fewest_layers(model: ModelConfig) -> int:
    return min(model.num_layers, len(_pattern(model)) + min(model.num_dense_layers, 1))


def _pattern(model: ModelConfig) -> str:
    """Return the order of attention kinds: the first eight, with runs of at most three of a kind."""
    kinds = model.layer_pattern if len(model.layer_pattern) < model.num_layers else layer_kinds(model)
    short = ""
    for kind in kinds:
        if not short.endswith(kind * 3):
            short += kind
    return short[:8]


def _num_layers(model: ModelConfig, pipeline: PipelineConfig, asked: Sizes, pp: int) -> int:
    if pipeline.layers:
        return sum(pipeline.layers)
    stages = num_stages(pipeline, pp)
    uneven = model.num_layers % num_stages(pipeline, asked["pp"] or 1) > 0 and stages > 1
    # Enough for the whole pattern; as many over as make stages uneven, or none.
    layers = ceil(max(_fewest_layers(model), stages) / stages) * stages
    if uneven:
        layers = layers - stages + 1 if layers - stages + 1 >= max(_fewest_layers(model), stages + 1) else layers + 1
    return layers


def _model(recipe: Recipe, stage: StageConfig, asked: Sizes, layout: Layout, pipeline: PipelineConfig) -> ModelConfig:
    model, tp = recipe.model, layout.dense["tp"]
    edp = layout.expert["edp_shard"]
    T = _tokens(layout)
    layers = _num_layers(model, pipeline, asked, layout.dense["pp"])
    dense = layers if model.num_dense_layers == model.num_layers else min(model.num_dense_layers, 1)
    scaling = model.rope_scaling
    reach = 2 * T
    return replace(
        model,
        vocab_size=_up(VOCAB, tp),
        hidden_size=_up(HIDDEN, edp),
        num_layers=layers,
        layer_pattern=_pattern(model),
        head_dim=HEAD_DIM,
        **_attention(model, _window(model, stage, asked, layout), asked["tp"] or 1, tp),
        num_dense_layers=dense,
        ffn_size=_up(FFN, tp),
        moe=_moe(model.moe, asked, layout),
        num_mtp_heads=min(model.num_mtp_heads, 2),
        init_std=INIT_STD,
        max_positions=reach,
        rope_scaling=scaling and _scaling(scaling, reach),
        loss_chunk=12,
    )


def _scaling(scaling: RopeScalingConfig, reach: int) -> RopeScalingConfig:
    return replace(scaling, original_max_positions=ceil(reach / scaling.factor))


def _tokens(layout: Layout) -> int:
    cp, tp = layout.dense["cp"], layout.dense["tp"]
    return _up(MIN_TOKENS, lcm(2 * cp if cp > 1 else 1, cp * tp))


def _kv_heads(kv_heads: int, asked_tp: int, tp: int) -> int:
    """Return the number of KV heads, in the same proportion to tp as far as it is small."""
    if kv_heads < asked_tp:
        return max(1, tp // (asked_tp // kv_heads))
    return tp * min(kv_heads // asked_tp, 2)


def _attention(model: ModelConfig, window: int, asked_tp: int, tp: int) -> dict[str, AttentionConfig]:
    """Return both kinds of attention, with heads in the same proportion between them as far as it is small."""
    kinds = {"full": model.full, "sliding": model.sliding}
    groups = {name: kind.num_heads // kind.num_kv_heads for name, kind in kinds.items()}
    groups = {name: min(group // gcd(*groups.values()), 4) for name, group in groups.items()}
    kv_heads = {name: _kv_heads(kind.num_kv_heads, asked_tp, tp) for name, kind in kinds.items()}
    factor = next(n for n in count_from(1) if not any(n * groups[name] * kv_heads[name] % tp for name in kinds))
    return {
        name: AttentionConfig(
            num_heads=factor * groups[name] * kv_heads[name],
            num_kv_heads=kv_heads[name],
            rotary_share=max(2, round(kind.rotary_share * HEAD_DIM / 2) * 2) / HEAD_DIM,
            window=kind.window and window,
        )
        for name, kind in kinds.items()
    }


def _window(model: ModelConfig, stage: StageConfig, asked: Sizes, layout: Layout) -> int:
    """Return the window in the same proportion to a rank's piece of a row: inside it, or across several borders."""
    assert model.sliding.window is not None, "validation asks for the window of sliding layers"
    T, cp = _tokens(layout), layout.dense["cp"]
    if cp == 1:
        share = min(model.sliding.window / stage.seq_len, 1.0)
        return max(5, round(T * min(share, 0.25))) if share < 1 else T
    pieces = model.sliding.window * 2 * (asked["cp"] or cp) / stage.seq_len
    piece = T // (2 * cp)
    return max(3, round(piece * pieces)) if pieces <= 1 else min(round(piece * pieces), T)


def _moe(moe: MoeConfig, asked: Sizes, layout: Layout) -> MoeConfig:
    """Return experts per rank that divide by the shards of the expert view as the user's do, more than a token
    chooses."""
    ep, etp, shards = (layout.expert[axis] for axis in ("ep", "etp", "edp_shard"))
    whole = asked["edp_shard"] is None or moe.num_experts // (asked["ep"] or 1) % asked["edp_shard"] == 0
    top_k = min(moe.top_k, 3)
    here = shards if whole else shards + 1
    while here * ep < 2 * top_k:
        here += shards
    groups = 1
    if moe.route_top_groups < moe.route_groups:
        groups = next(n for n in count_from(2) if here * ep % n == 0)
    return replace(
        moe,
        num_experts=here * ep,
        top_k=top_k,
        ffn_size=_up(EXPERT_FFN, etp * (1 if whole else shards)),
        shared_ffn_size=EXPERT_FFN,
        route_groups=groups,
        route_top_groups=ceil(top_k / (here * ep // groups)),
    )


def _stage(
    recipe: Recipe, stage: StageConfig, asked: Sizes, layout: Layout, model: ModelConfig, pipeline: PipelineConfig
) -> StageConfig:
    small = replace(
        stage,
        tokens=10**9,
        seq_len=_tokens(layout),
        ramp=(),
        micro_batch=2,
        mtp_heads=stage.mtp_heads and min(stage.mtp_heads, model.num_mtp_heads),
        lr=LrConfig(peak=stage.lr.peak),
        balance=_balance(stage.balance, model.moe.num_experts, asked, layout),
        limits=LimitsConfig(
            routed=_limits(stage.limits.routed, recipe.model, model),
            shared=_limits(stage.limits.shared, recipe.model, model),
        ),
    )
    count = _micro_batches(recipe, small, layout, model, pipeline)
    # All ranks must be able to share a batch as data-parallel ones, under the second layout; rows of a micro-batch are
    # to be several.
    rows = next(n for n in count_from(2) if count * n * layout.data_ranks % layout.world_size == 0)
    return replace(small, micro_batch=rows, batch_size=count * rows * layout.data_ranks)


def _balance(balance: BalanceConfig, num_experts: int, asked: Sizes, layout: Layout) -> BalanceConfig:
    """Return the balance with a fixed number of groups, because ep differs in one process."""
    groups = layout.expert["ep"]
    if balance.num_groups is not None and balance.num_groups != (asked["ep"] or 1):
        groups = max(n for n in range(1, balance.num_groups + 1) if num_experts % n == 0)
    return replace(balance, bias_rate_end=None, num_groups=groups)


def _limits(limits: dict[int, float], model: ModelConfig, small: ModelConfig) -> dict[int, float]:
    """Return limits on layers at the same distance from the end."""
    shift = model.num_layers - small.num_layers
    return {n - shift: LIMIT for n in limits if n - shift >= small.num_dense_layers}


def _micro_batches(
    recipe: Recipe, stage: StageConfig, layout: Layout, model: ModelConfig, pipeline: PipelineConfig
) -> int:
    """Return the fewest micro-batches, two or more, that the schedule accepts."""
    parallel = replace(recipe.parallel, pipeline=pipeline)
    for count in count_from(2):
        stages = {"": replace(stage, micro_batch=1, batch_size=count * layout.data_ranks)}
        try:
            check_layout(replace(recipe, model=model, parallel=parallel, stages=stages), layout)
        except MeshError:
            assert count < MOST_MICRO_BATCHES, f"no number of micro-batches suits {layout}"
            continue
        return count
    raise AssertionError("counting does not end")


def _second(small: Recipe, layout: Layout) -> Recipe:
    """Return another layout of as many ranks: data parallel with the largest possible ep, or without ep if that is the
    first one."""
    world = layout.world_size
    experts = small.model.moe.num_experts
    sizes = [ep for ep in range(world, 0, -1) if world % ep == 0 and experts % ep == 0]
    pipeline = replace(small.parallel.pipeline, layers=())
    stages = {name: replace(stage, micro_batch=1) for name, stage in small.stages.items()}
    views = [(DenseMeshConfig(), ExpertMeshConfig(ep=ep)) for ep in sizes]
    views += [(DenseMeshConfig(tp=2), ExpertMeshConfig()), (DenseMeshConfig(dp_replicate=2), ExpertMeshConfig())]
    for dense, expert in views:
        parallel = replace(small.parallel, pp=1, dense=dense, expert=expert, pipeline=pipeline)
        second = replace(small, parallel=parallel, stages=stages)
        try:
            resolved = resolve_layout(parallel, world)
            check_layout(second, resolved)
        except MeshError:
            continue
        if (resolved.dense, resolved.expert) != (layout.dense, layout.expert):
            return second
    return small


def _changes(recipe: Recipe, small: Recipe, stage: str) -> dict[str, tuple[object, object]]:
    before, after = _numbers(recipe, stage), _numbers(small, stage)
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def _numbers(recipe: Recipe, stage_name: str) -> dict[str, object]:
    model, stage, parallel = recipe.model, recipe.stages[stage_name], recipe.parallel
    heads = [f"{kind.num_heads}:{kind.num_kv_heads}" for kind in (model.full, model.sliding)]
    return {
        "precision": recipe.precision,
        "layers": model.num_layers,
        "pattern": model.layer_pattern,
        "leading dense layers": model.num_dense_layers,
        "MTP heads": model.num_mtp_heads,
        "hidden size": model.hidden_size,
        "vocabulary": model.vocab_size,
        "heads : KV heads, full": heads[0],
        "heads : KV heads, sliding": heads[1],
        "window": model.sliding.window,
        "experts": model.moe.num_experts,
        "experts a token": model.moe.top_k,
        "sequence": stage.seq_len,
        "batch": stage.batch_size,
        "micro-batch": stage.micro_batch,
        "EP groups": stage.balance.num_groups,
        "activation limits": {**stage.limits.routed, **stage.limits.shared} or None,
        "initial standard deviation": model.init_std,
        "layers of the stages": list(parallel.pipeline.layers) or None,
        "compile": parallel.compile,
    }


def _up(size: int, unit: int) -> int:
    """Return the first multiple of `unit` that is at least `size`."""
    return ceil(size / unit) * unit
