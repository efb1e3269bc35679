"""Axis sizes of both views, from the recipe and the number of ranks."""

import pytest
from steptron.config.schema import DenseMeshConfig, ExpertMeshConfig, ParallelConfig
from steptron.errors import MeshError
from steptron.parallel.mesh import DENSE_AXES, EXPERT_AXES, recipe_key, resolve_layout

from messages import unknown_keys


def test_both_views_cover_the_same_ranks():
    parallel = ParallelConfig(pp=2, dense=DenseMeshConfig(cp=2, tp=2), expert=ExpertMeshConfig(ep=8, etp=2))
    layout = resolve_layout(parallel, 64)
    assert layout.dense == {"pp": 2, "dp_replicate": 1, "dp_shard": 8, "cp": 2, "tp": 2}
    assert layout.expert == {"pp": 2, "edp_replicate": 1, "edp_shard": 2, "ep": 8, "etp": 2}
    assert layout.data_ranks == 8


def test_flash_layout_on_4096_ranks():
    layout = resolve_layout(ParallelConfig(pp=8, expert=ExpertMeshConfig(ep=8)), 4096)
    assert layout.dense["dp_shard"] == 512
    assert layout.expert["edp_shard"] == 64


@pytest.mark.parametrize(
    ("parallel", "world_size", "parts"),
    [
        (
            ParallelConfig(dense=DenseMeshConfig(tp=3)),
            8,
            [
                "parallel.dense",
                "tp=3",
                "multiple of 3",
                "there are 8",
                "6 or 9 ranks, or set parallel.dense.tp to 2 or 4",
            ],
        ),
        (
            ParallelConfig(expert=ExpertMeshConfig(dp_shard=2, ep=2)),
            8,
            [
                "parallel.expert",
                "makes 4 ranks",
                "there are 8",
                "set parallel.expert.dp_shard to 4, or parallel.expert.ep to 4",
            ],
        ),
        (ParallelConfig(dense=DenseMeshConfig(cp=0)), 2, ["parallel.dense.cp=0", "at least 1"]),
        (
            ParallelConfig(dense=DenseMeshConfig(dp_replicate=-1)),
            2,
            ["parallel.dense.dp_shard=-1", "only one of them can be -1"],
        ),
        (ParallelConfig(pp=3), 2, ["pp=3", "multiple of 3", "there are 2", "start 3 ranks, or set parallel.pp to 2"]),
    ],
    ids=["not a multiple", "wrong product", "zero", "two rests", "more than there are"],
)
def test_impossible_layouts_name_axis_value_and_way_out(parallel, world_size, parts):
    with pytest.raises(MeshError) as caught:
        resolve_layout(parallel, world_size)
    for part in parts:
        assert part in str(caught.value)
    assert unknown_keys(str(caught.value)) == []


@pytest.mark.parametrize("axis", sorted({*DENSE_AXES, *EXPERT_AXES}))
@pytest.mark.parametrize(("size", "rest"), [(0, 1), (3, -1), (3, 1), (-1, -1)], ids=str)
def test_whichever_axis_is_wrong_is_named_by_its_key(axis, size, rest):
    *_, view, name = recipe_key(axis).split(".")
    other = "dp_replicate" if name == "dp_shard" else "dp_shard"
    sizes = {other: rest} if view == "parallel" else {other: rest, name: size}
    dense = DenseMeshConfig(**sizes) if view != "expert" else DenseMeshConfig()
    expert = ExpertMeshConfig(**sizes) if view == "expert" else ExpertMeshConfig()
    parallel = ParallelConfig(pp=size if axis == "pp" else 1, dense=dense, expert=expert)
    with pytest.raises(MeshError) as caught:
        resolve_layout(parallel, 4)
    assert f"{recipe_key(axis)}={size}" in str(caught.value)
    assert unknown_keys(str(caught.value)) == []


def test_both_views_must_agree_on_the_pipeline_ranks_that_are_left():
    parallel = ParallelConfig(pp=-1, dense=DenseMeshConfig(dp_shard=2), expert=ExpertMeshConfig(dp_shard=1))
    with pytest.raises(MeshError, match=r"parallel\.pp=-1 becomes 4 with parallel\.dense and 8 with parallel\.expert"):
        resolve_layout(parallel, 8)
