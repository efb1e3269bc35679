"""The small recipe keeps what a layout can trip over, fits its mesh, and trains in one process and in the second layout
alike."""

from dataclasses import replace
from functools import cache

import pytest
from steptron.config.resolve import resolve
from steptron.config.schema import Recipe, layer_kinds
from steptron.config.validate import validate
from steptron.errors import MeshError, RecipeError
from steptron.parallel.mesh import resolve_layout
from steptron.parallel.pipeline_split import num_stages
from steptron.parallel.rules import check_layout
from steptron.prove.layout import asked_axes, fit
from steptron.prove.shrink import Small, shrink

DEMO_BATCH = "stages.base.ramp=[] stages.base.micro_batch=1"
LAYOUTS = {
    "flash": "step3p5_flash",
    "flash, tp beyond kv heads": "step3p5_flash parallel.dense.tp=16 parallel.expert.etp=2",
    "flash, all axes": "step3p5_flash parallel.dense.tp=8 parallel.dense.cp=4 parallel.dense.dp_replicate=2 "
    "parallel.expert.dp_replicate=2 parallel.expert.etp=2",
    "flash, zb-v": "step3p5_flash parallel.pp=4 parallel.pipeline.schedule=zb-v parallel.dense.tp=2",
    "flash, interleaved": "step3p5_flash parallel.pipeline.schedule=interleaved parallel.dense.cp=2",
    "flash, dualpipe": "step3p5_flash parallel.pipeline.schedule=dualpipe-v",
    "flash, written stages": "step3p5_flash parallel.pipeline.layers=[4,6,6,6,6,6,6,5]",
    "flash, long": "step3p5_flash parallel.dense.cp=8 --stage mid-2",
    "mini": "step3p5_mini",
    "demo": "demo",
    "demo, three": f"demo parallel.pp=3 parallel.dense.cp=2 parallel.expert.ep=2 {DEMO_BATCH} stages.base.batch_size=48",
    "demo, experts cut": "demo model.moe.num_experts=12 parallel.dense.dp_shard=8 stages.base.balance.num_groups=4 "
    f"{DEMO_BATCH}",
    "demo, route groups": f"demo model.moe.route_groups=4 model.moe.route_top_groups=2 {DEMO_BATCH}",
    "demo, experts cut, route groups": "demo model.moe.num_experts=12 parallel.dense.dp_shard=8 stages.base.balance.num_groups=4 "
    f"model.moe.route_groups=4 model.moe.route_top_groups=2 {DEMO_BATCH}",
    "demo, six layers on four": f"demo parallel.pp=4 {DEMO_BATCH}",
    "demo, all dense": "demo model.num_dense_layers=6 model.num_mtp_heads=0 parallel.dense.tp=2 "
    + " ".join(f"stages.{name}.mtp_weight=0 ~stages.{name}.limits" for name in ("base", "long", "longer")),
    "demo, frozen": "demo parallel.dense.cp=2 --stage longer",
}


def test_route_groups_stay_a_limit():
    moe = small_of(LAYOUTS["demo, route groups"]).recipe.model.moe
    assert moe.route_top_groups < moe.route_groups


@cache
def recipe_of(arguments: str) -> Recipe:
    words = arguments.split()
    stage = words[words.index("--stage") + 1] if "--stage" in words else ""
    return resolve(words[0], [word for word in words[1:] if "=" in word or "~" in word], stage=stage)


def small_of(arguments: str, ranks: int = 8) -> Small:
    return shrink(recipe_of(arguments), ranks)


@pytest.mark.parametrize("ranks", [4, 8, 16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_small_recipes_are_legal(name: str, ranks: int):
    small = small_of(LAYOUTS[name], ranks)
    layout = small.fit.layout
    assert layout.world_size <= ranks
    for recipe, world_size in ((small.recipe, layout.world_size), (small.second, layout.world_size), (small.alone, 1)):
        validate(recipe)
        check_layout(recipe, resolve_layout(recipe.parallel, world_size))
    (stage,) = small.recipe.stages.values()
    assert resolve_layout(small.recipe.parallel, layout.world_size) == layout
    assert stage.batch_size // (stage.micro_batch * layout.data_ranks) >= 2
    assert small.recipe.precision == "fp32"
    assert not small.recipe.parallel.compile
    assert stage.balance.num_groups is not None, "it must not depend on the layout"


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_axis_divides_the_users_and_what_is_left_out_is_said(name: str):
    small = small_of(LAYOUTS[name])
    sizes = small.fit.layout.dense | small.fit.layout.expert
    for axis, asked in small.asked.items():
        assert asked is None or asked % sizes[axis] == 0
    assert set(small.fit.left_out) == {a for a, asked in small.asked.items() if asked != 1 and sizes[a] == 1}
    if small.fit.left_out and small.fit.enough is not None:
        assert not fit(small.asked, small.fit.enough).left_out


def test_what_a_layout_trips_over_is_kept():
    flash = resolve("step3p5_flash")
    small = small_of("step3p5_flash parallel.dense.tp=16 parallel.expert.etp=2", 16).recipe
    model, layout = small.model, small.parallel
    assert layout.dense.tp > model.sliding.num_kv_heads, "KV heads are fewer than tp ranks"
    assert model.sliding.num_heads * flash.model.full.num_heads == model.full.num_heads * flash.model.sliding.num_heads
    assert set(layer_kinds(model)[model.num_dense_layers :]) == {"F", "S"}, "both kinds have experts"
    assert model.num_dense_layers == 1
    assert model.num_mtp_heads == 2, "heads are chained"
    assert model.num_layers % num_stages(layout.pipeline, layout.pp), "45 layers over 8 stages are uneven"
    assert model.moe.top_k > 1
    even = small_of(f"demo parallel.pp=2 {DEMO_BATCH}").recipe
    assert even.model.num_layers % 2 == 0, "6 layers over 2 stages are even"


def test_experts_that_do_not_divide_by_the_shards_still_do_not():
    small = small_of(LAYOUTS["demo, experts cut"])
    shards = small.fit.layout.expert["edp_shard"]
    assert shards > 1
    assert small.recipe.model.moe.num_experts // small.fit.layout.expert["ep"] % shards


@pytest.mark.parametrize(
    ("window", "seq_len", "inside"), [(512, 4096, True), (512, 1024, False)], ids=["inside a piece", "over several"]
)
def test_the_window_keeps_its_proportion_to_a_piece_of_context_parallelism(window: int, seq_len: int, inside: bool):
    recipe = resolve("step3p5_flash", ["parallel.dense.cp=2"])
    stage = replace(recipe.stages["pre-1"], seq_len=seq_len)
    recipe = replace(recipe, stages={"pre-1": stage})
    small = shrink(recipe, 8).recipe
    (stage,) = small.stages.values()
    piece = stage.seq_len // (2 * small.parallel.dense.cp)
    assert small.model.sliding.window is not None
    assert (small.model.sliding.window <= piece) == inside


def test_the_layout_itself_is_proved_where_it_fits():
    small = small_of(f"demo parallel.dense.tp=2 parallel.dense.dp_shard=2 parallel.expert.ep=4 {DEMO_BATCH}")
    assert small.fit.layout.world_size == 4, "as many ranks as the layout has"
    assert small.fit.layout.dense["tp"] == small.fit.layout.dense["dp_shard"] == 2
    assert small.fit.layout.expert["ep"] == 4


def test_written_axes_come_before_what_is_left():
    recipe = resolve("demo", "parallel.pp=2 parallel.dense.tp=2 parallel.dense.cp=2 parallel.expert.ep=8".split())
    asked, _ = asked_axes(recipe.parallel, None)
    found = fit(asked, 8)
    assert (found.layout.dense["pp"], found.layout.dense["tp"], found.layout.dense["cp"]) == (2, 2, 2)
    assert found.left_out == ("dp_shard",)
    assert found.enough == 32


def test_pipeline_ranks_that_are_left_need_the_runs_ranks():
    recipe = resolve("demo", ["parallel.pp=-1", "parallel.dense.dp_shard=1", "parallel.expert.dp_shard=1"])
    with pytest.raises(MeshError, match="--world"):
        asked_axes(recipe.parallel, None)
    asked, _ = asked_axes(recipe.parallel, 4)
    assert asked["pp"] == 4


BROKEN = {
    "batch": "stages.{}.batch_size=3 stages.{}.micro_batch=2",
    "too long": "stages.{}.seq_len=8192",
    "warm-up": "stages.{}.lr.warmup=1B",
    "no source": "stages.{}.mix={{prose:0,code:0}}",
    "limits of a dense layer": "stages.{}.limits.routed={{0:7.0}}",
    "not over the data ranks": "stages.{}.batch_size=3 stages.{}.micro_batch=1 parallel.dense.dp_shard=2",
}
"""Rules that a stage breaks."""


@pytest.mark.parametrize("rule", BROKEN)
@pytest.mark.parametrize(("proved", "broken"), [("base", "longer"), ("longer", "base")])
def test_a_rule_that_a_stage_breaks_is_of_that_stages_proof_alone(rule: str, proved: str, broken: str):
    overrides = BROKEN[rule].format(broken, broken)
    layout = " parallel.dense.dp_shard=2" if "dp_shard" in overrides else ""
    assert small_of(f"demo {overrides} --stage {proved}") == small_of(f"demo{layout} --stage {proved}")
    with pytest.raises((RecipeError, MeshError), match=rf"^stages\.{broken}\."):
        small_of(f"demo {overrides} --stage {broken}")
