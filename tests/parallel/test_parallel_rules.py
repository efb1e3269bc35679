"""Every rule between a layout and a recipe: what is legal passes, what is not names key, value, rule and the nearest
legal values."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from steptron.config.resolve import resolve
from steptron.config.schema import DenseMeshConfig, ExpertMeshConfig, ParallelConfig, PipelineConfig, RampStep, Recipe
from steptron.errors import MeshError
from steptron.parallel import rules
from steptron.parallel.mesh import resolve_layout
from steptron.parallel.pipeline_split import num_stages
from steptron.parallel.rules import check_layout

from bare_stages import SCHEDULES, BareStage
from messages import unknown_keys
from small_runs import steptron, write_recipe
from tiny import tiny_recipe


def wide_recipe(**changes) -> Recipe:
    """The tiny run with sizes that many layouts divide, in one stage of `changes`."""
    recipe = tiny_recipe(Path("corpus"), Path("run"))
    model = replace(
        recipe.model,
        vocab_size=304,
        num_layers=6,
        full=replace(recipe.model.full, num_heads=16, num_kv_heads=4),
        sliding=replace(recipe.model.sliding, num_heads=24, num_kv_heads=4),
        moe=replace(recipe.model.moe, num_experts=24),
    )
    stage = replace(recipe.stages["base"], seq_len=96, batch_size=48, micro_batch=1)
    parts = {name: changes.pop(name) for name in list(changes) if name in ("seq_len", "batch_size", "ramp")}
    return replace(recipe, model=replace(model, **changes), stages={"base": replace(stage, **parts)})


def dense(**axes) -> ParallelConfig:
    return ParallelConfig(dense=DenseMeshConfig(**axes))


def expert(**axes) -> ParallelConfig:
    return ParallelConfig(expert=ExpertMeshConfig(**axes))


def pipeline(pp: int, schedule: str = "1f1b", **values) -> ParallelConfig:
    return ParallelConfig(pp=pp, pipeline=PipelineConfig(schedule=schedule, **values))


FULL = wide_recipe().model.full
MOE = wide_recipe().model.moe

LEGAL = {
    "one rank": ({}, ParallelConfig(), 1),
    "everything at once": (
        {},
        ParallelConfig(pp=2, dense=DenseMeshConfig(cp=2, tp=4), expert=ExpertMeshConfig(ep=4, etp=2)),
        32,
    ),
    "KV heads copied": ({}, dense(tp=8), 8),
    "experts cut": ({"moe": replace(MOE, num_experts=3)}, expert(dp_shard=16), 16),
    "no sliding layer": (
        {"layer_pattern": "F", "num_mtp_heads": 0, "sliding": replace(FULL, num_heads=5, num_kv_heads=1, window=8)},
        dense(tp=2),
        2,
    ),
    "no experts": ({"num_dense_layers": 6}, expert(ep=16), 16),
    "layers by hand": ({}, pipeline(2, "zb-v", layers=(2, 2, 1, 1)), 2),
    "a schedule without a pipeline": ({}, pipeline(1, "zb-v"), 2),
    "odd sequence without cp": ({"seq_len": 33}, dense(tp=1), 2),
}

ILLEGAL = {
    "heads, full": (
        {"full": replace(FULL, num_heads=12)},
        dense(tp=8),
        8,
        "parallel.dense.tp=8 does not divide model.full.num_heads=12; nearest: 4",
    ),
    "heads, sliding": (
        {"sliding": replace(FULL, num_heads=20, window=8)},
        dense(tp=8),
        16,
        "parallel.dense.tp=8 does not divide model.sliding.num_heads=20; nearest: 4",
    ),
    "KV heads, full": (
        {"full": replace(FULL, num_heads=24, num_kv_heads=6)},
        dense(tp=4),
        24,
        "parallel.dense.tp=4 does not divide model.full.num_kv_heads=6 and is not a multiple of it; nearest: 2",
    ),
    "KV heads, sliding": (
        {"full": replace(FULL, num_heads=24), "sliding": replace(FULL, num_heads=24, num_kv_heads=8, window=8)},
        dense(tp=12),
        24,
        "parallel.dense.tp=12 does not divide model.sliding.num_kv_heads=8 and is not a multiple of it; nearest: 8",
    ),
    "FFN": ({"ffn_size": 52}, dense(tp=8), 8, "parallel.dense.tp=8 does not divide model.ffn_size=52; nearest: 4"),
    "vocabulary": (
        {"vocab_size": 300},
        dense(tp=8),
        8,
        "parallel.dense.tp=8 does not divide model.vocab_size=300; nearest: 4",
    ),
    "sequence in head and tail": (
        {"seq_len": 90},
        dense(cp=2),
        2,
        "stages.base.seq_len=90 is not divisible by 2 × parallel.dense.cp = 2 × 2; nearest: 88, 92",
    ),
    "sequence over tp": (
        {"seq_len": 92},
        dense(cp=2, tp=4),
        8,
        "stages.base.seq_len=92 is not divisible by parallel.dense.cp × parallel.dense.tp = 2 × 4; nearest: 88, 96",
    ),
    "sequence below max_positions": (
        {"seq_len": 127},
        dense(tp=4),
        4,
        "stages.base.seq_len=127 is not divisible by parallel.dense.cp × parallel.dense.tp = 1 × 4; nearest: 124, 128",
    ),
    "experts": ({}, expert(ep=5), 40, "parallel.expert.ep=5 does not divide model.moe.num_experts=24; nearest: 4, 8"),
    "expert columns": (
        {},
        expert(etp=6),
        24,
        "parallel.expert.etp=6 does not divide model.moe.ffn_size=16; nearest: 4, 8",
    ),
    "expert shards": (
        {},
        expert(dp_shard=16, ep=2, etp=2),
        64,
        "parallel.expert.dp_shard=16 divides neither model.moe.num_experts / parallel.expert.ep = 12 (complete experts on a rank) "
        "nor both model.hidden_size=32 and model.moe.ffn_size / parallel.expert.etp = 8 (split experts); "
        "parallel.expert.dp_replicate can take the rest; nearest: 8",
    ),
    "expert shards, hidden size": (
        {"hidden_size": 36, "moe": replace(MOE, num_experts=4)},
        expert(dp_shard=8),
        8,
        "parallel.expert.dp_shard=8 divides neither model.moe.num_experts / parallel.expert.ep = 4 (complete experts on a rank) "
        "nor both model.hidden_size=36 and model.moe.ffn_size / parallel.expert.etp = 16 (split experts); "
        "parallel.expert.dp_replicate can take the rest; nearest: 4",
    ),
    "more stages than layers and ends": (
        {"num_mtp_heads": 0},
        pipeline(4, "zb-v"),
        12,
        "parallel.pp=4 with parallel.pipeline.schedule=zb-v makes 8 stages, more than model.num_layers=6 and the 1 ends "
        "behind them (the output matrix, and a block and an output matrix for each MTP head); nearest: 3",
    ),
    "more chunks than layers and ends": (
        {"num_mtp_heads": 0},
        pipeline(2, "interleaved", chunks=4),
        2,
        "parallel.pp=2 with parallel.pipeline.schedule=interleaved makes 8 stages, more than model.num_layers=6 and the "
        "1 ends behind them (the output matrix, and a block and an output matrix for each MTP head); nearest: 1",
    ),
    "layers without a pipeline": (
        {},
        pipeline(1, layers=(6,)),
        1,
        "parallel.pipeline.layers=[6] has no effect with parallel.pp=1; leave it empty, or increase parallel.pp",
    ),
    "layers, number": (
        {},
        pipeline(2, "dualpipe-v", layers=(3, 3)),
        2,
        "parallel.pipeline.layers=[3, 3] has 2 entries, but parallel.pp=2 with parallel.pipeline.schedule=dualpipe-v "
        "makes 4 stages; set [2, 2, 1, 1], or leave it empty",
    ),
    "layers, less than none": (
        {},
        pipeline(2, layers=(7, -1)),
        2,
        "parallel.pipeline.layers=[7, -1]: a stage cannot have less than 0 layers; set [3, 3], or leave it empty",
    ),
    "layers, none in the middle": (
        {},
        pipeline(4, layers=(3, 0, 3, 0)),
        4,
        "parallel.pipeline.layers=[3, 0, 3, 0]: stage 2 has 0 layers, and stages behind it have some; only the first "
        "stage, with the embedding, and the last ones, with the ends (the output matrix, and a block and an output "
        "matrix for each MTP head), may have none; set [2, 2, 1, 1], or leave it empty",
    ),
    "layers, more stages of ends than ends": (
        {"num_mtp_heads": 0},
        pipeline(4, layers=(3, 3, 0, 0)),
        4,
        "parallel.pipeline.layers=[3, 3, 0, 0]: 2 stages have 0 layers at the end, but only 1 ends are there for them "
        "(the output matrix, and a block and an output matrix for each MTP head); set [2, 2, 1, 1], or leave it empty",
    ),
    "layers, sum": (
        {},
        pipeline(2, layers=(3, 4)),
        2,
        "parallel.pipeline.layers=[3, 4] sums to 7, not to model.num_layers=6; set [3, 3], or leave it empty",
    ),
    "batch": (
        {"batch_size": 50},
        dense(),
        4,
        "stages.base.batch_size=50 is not divisible by stages.base.micro_batch × data-parallel ranks = 1 × 4 = 4; nearest: 48, 52",
    ),
    "batch of a ramp": (
        {"ramp": (RampStep(until=500, batch_size=6),)},
        dense(),
        4,
        "stages.base.ramp.0.batch_size=6 is not divisible by stages.base.micro_batch × data-parallel ranks = 1 × 4 = 4; nearest: 4, 8",
    ),
    "micro-batches, dualpipe-v": (
        {"ramp": (RampStep(until=500, batch_size=3),)},
        pipeline(2, "dualpipe-v"),
        2,
        "stages.base.ramp.0.batch_size=3 makes 3 micro-batches of 1 × 1 sequences, but parallel.pipeline.schedule="
        "dualpipe-v needs at least one per stage = 4; nearest: 4",
    ),
    "micro-batches, interleaved": (
        {"batch_size": 14},
        pipeline(2, "interleaved"),
        4,
        "stages.base.batch_size=14 makes 7 micro-batches of 1 × 2 sequences, but parallel.pipeline.schedule=interleaved "
        "works in equal rounds of at least parallel.pp=2 micro-batches; nearest: 12, 16",
    ),
    "batch under a schedule": (
        {"batch_size": 13},
        pipeline(2, "interleaved"),
        4,
        "stages.base.batch_size=13 is not divisible by stages.base.micro_batch × data-parallel ranks = 1 × 2 = 2; nearest: 12, 16",
    ),
}


@pytest.mark.parametrize(("changes", "parallel", "world_size"), LEGAL.values(), ids=LEGAL)
def test_a_layout_that_fits(changes: dict, parallel: ParallelConfig, world_size: int) -> None:
    recipe = replace(wide_recipe(**changes), parallel=parallel)
    check_layout(recipe, resolve_layout(parallel, world_size))


@pytest.mark.parametrize(("changes", "parallel", "world_size", "message"), ILLEGAL.values(), ids=ILLEGAL)
def test_a_layout_that_does_not(changes: dict, parallel: ParallelConfig, world_size: int, message: str) -> None:
    recipe = replace(wide_recipe(**changes), parallel=parallel)
    with pytest.raises(MeshError) as caught:
        check_layout(recipe, resolve_layout(parallel, world_size))
    assert str(caught.value) == message
    assert unknown_keys(message) == []


def torch_takes(schedule: str, pp: int, num_micro_batches: int) -> bool:
    stages = num_stages(PipelineConfig(schedule=schedule), pp)
    mine = [0, pp] if schedule == "interleaved" else [0, stages - 1]
    bare = [BareStage(i, stages, pp) for i in mine]
    made = SCHEDULES[schedule]
    try:
        made(bare, num_micro_batches)
    except ValueError:  # its words for too few, or for rounds of unequal size
        return False
    return True


@pytest.mark.parametrize("schedule", ["interleaved", "zb-v", "dualpipe-v"])
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_the_numbers_of_micro_batches_are_those_that_torch_takes(schedule: str, pp: int) -> None:
    parallel = pipeline(pp, schedule)
    layout = resolve_layout(parallel, pp)
    legal = []
    for n in range(1, 25):
        try:
            check_layout(replace(wide_recipe(batch_size=n, num_layers=8), parallel=parallel), layout)
        except MeshError:
            continue
        legal.append(n)
    assert legal == [n for n in range(1, 25) if torch_takes(schedule, pp, n)]


def test_the_command_says_it_once_on_two_ranks(tmp_path: Path) -> None:
    path = write_recipe(tiny_recipe(tmp_path, tmp_path / "run"), tmp_path / "tiny.yaml")
    done = steptron(
        "train", path, "model.full.num_heads=3", "model.full.num_kv_heads=1", "parallel.dense.tp=2", ranks=2, code=2
    )
    assert done.stderr == "error: parallel.dense.tp=2 does not divide model.full.num_heads=3; nearest: 1\n"
    assert not (tmp_path / "run").exists()


TWO_MESHES = {
    "parallel.dense.tp=2": ParallelConfig(dense=DenseMeshConfig(tp=2)),
    "parallel.expert.ep=4": ParallelConfig(expert=ExpertMeshConfig(ep=4)),
    "parallel.expert.etp=2": ParallelConfig(expert=ExpertMeshConfig(etp=2)),
    "parallel.expert.dp_replicate=1": ParallelConfig(dense=DenseMeshConfig(dp_replicate=2)),
}


@pytest.mark.parametrize("key", TWO_MESHES)
def test_a_torch_with_one_mesh_for_each_layer_refuses_two(key: str, monkeypatch: pytest.MonkeyPatch):
    layout = resolve_layout(TWO_MESHES[key], 8)
    rules.check_fsdp(layout)
    monkeypatch.setattr(rules, "SHARDS_BY_PARAMETER", False)
    with pytest.raises(
        MeshError, match=rf"^{key} shards .* torch {re.escape(torch.__version__)} cannot do; install torch"
    ):
        rules.check_fsdp(layout)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(pp=2, dense=DenseMeshConfig(cp=2)),
        ParallelConfig(dense=DenseMeshConfig(dp_replicate=2), expert=ExpertMeshConfig(dp_replicate=2)),
    ],
    ids=["dp", "pp and cp", "replicas"],
)
def test_a_torch_with_one_mesh_for_each_layer_takes_data_parallel_ones(parallel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rules, "SHARDS_BY_PARAMETER", False)
    rules.check_fsdp(resolve_layout(parallel, 8))


def test_the_checks_of_a_layout_ask_whether_torch_can_shard_it(monkeypatch: pytest.MonkeyPatch):
    """So the doctor says it, and a start is refused before there are ranks. DeepSpeed shards in its own way."""
    recipe = resolve("demo", ["parallel.expert.ep=2"], None)
    layout = resolve_layout(recipe.parallel, 2)
    check_layout(recipe, layout)
    monkeypatch.setattr(rules, "SHARDS_BY_PARAMETER", False)
    with pytest.raises(MeshError, match=r"parallel\.expert\.ep=2 shards parameters"):
        check_layout(recipe, layout)
