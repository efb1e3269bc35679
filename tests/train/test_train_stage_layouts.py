"""Stages with a layout of their own: the run is built again at their border, and trains on the same tokens as ever.

On one process, where layouts differ in what is recomputed. Layouts of several ranks are in test_train_layouts.py.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from steptron.config.layouts import by_layout, part_with, ranks_of_stages, since
from steptron.config.resolve import resolve
from steptron.config.schema import CheckpointConfig, ParallelConfig, Recipe, RecomputeConfig
from steptron.errors import MeshError, OtherRanks
from steptron.launcher.other_ranks import NEXT_VARIABLE, read_next, tell_launcher, way_on
from steptron.train.process_group import launched_layouts

from small_runs import column, ledger, metrics, steptron, write_recipe
from tiny import tiny_recipe

OTHER = ParallelConfig(recompute=RecomputeConfig(parts=("ffn",)))
NAMES = ("loss", "mtp_loss", "balance_loss", "total_loss", "grad_norm", "tokens")


def bordered(corpus: Path, run_dir: Path, parallel: ParallelConfig | None) -> Recipe:
    """Two stages of five steps, the second one in another layout; checkpoints at steps 3, 5, 6, 9 and 10."""
    recipe = tiny_recipe(corpus, run_dir, data_ranks=2, checkpoint=CheckpointConfig(every=3, keep=9))
    stages = {name: replace(stage, tokens=stage.tokens // 2) for name, stage in recipe.stages.items()}
    return replace(recipe, stages=stages | {"long": replace(stages["long"], parallel=parallel)})


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("borders")
    for name, parallel in (("one layout", None), ("two layouts", OTHER)):
        recipe = bordered(corpus, folder / name, parallel)
        steptron("train", write_recipe(recipe, folder / f"{name}.yaml"))
    return {name: folder / name for name in ("one layout", "two layouts")}


def test_a_border_changes_no_bit(runs: dict[str, Path]) -> None:
    for name in NAMES:
        assert column(runs["two layouts"], name) == column(runs["one layout"], name), name
    assert [line["step"] for line in metrics(runs["two layouts"])] == list(range(1, 11)), "each step once"


def test_the_ledger_tells_the_border(runs: dict[str, Path]) -> None:
    kinds = ("run_start", "stage_start", "new_layout", "resume", "run_end")
    events = [(e["event"], e["step"]) for e in ledger(runs["two layouts"]) if e["event"] in kinds]
    border = [("new_layout", 5), ("resume", 5), ("stage_start", 5)]
    assert events == [("run_start", 0), ("stage_start", 0), *border, ("run_end", 10)]
    assert next(e for e in ledger(runs["two layouts"]) if e["event"] == "new_layout")["stage"] == "long"


def test_a_resumed_run_crosses_the_border_again(runs: dict[str, Path]) -> None:
    steptron("resume", runs["two layouts"], "--step", 3)
    for name in NAMES:
        assert column(runs["two layouts"], name) == column(runs["one layout"], name), name
    assert [e["step"] for e in ledger(runs["two layouts"]) if e["event"] == "new_layout"] == [5, 5]


def test_neighbouring_stages_with_one_layout_are_one_part(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path)
    base, long = recipe.stages.values()
    recipe = replace(recipe, stages={"a": base, "b": long, "c": replace(base, parallel=OTHER), "d": base})
    parts = by_layout(recipe)
    assert [list(part.stages) for part in parts] == [["a", "b"], ["c"], ["d"]]
    assert [part.parallel for part in parts] == [recipe.parallel, OTHER, recipe.parallel]
    assert part_with(recipe, "c") == parts[1]


def test_the_layout_of_every_stage_is_checked_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = resolve("demo", ["stages.long.parallel={dense: {cp: 2}, expert: {ep: 2}}"])
    layouts = launched_layouts(recipe)
    assert [layouts[name].dense["cp"] for name in recipe.stages] == [1, 2, 1]
    assert layouts["long"].expert["ep"] == 2
    with pytest.raises(
        MeshError, match=r"^stages\.long, which has its own layout: .*dense\.cp=3 needs a multiple of 3 ranks"
    ):
        launched_layouts(resolve("demo", ["stages.long.parallel={dense: {cp: 3}}"]))


def test_a_stage_with_its_own_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["stages.long.parallel={ranks: 4, dense: {cp: 2}}", "stages.longer.parallel={ranks: 1}"]
    recipe = resolve("demo", own)
    first, second, third = recipe.stages
    monkeypatch.setenv("WORLD_SIZE", "2")
    layouts = launched_layouts(recipe)
    assert [layouts[name].world_size for name in recipe.stages] == [2, 4, 1]
    with pytest.raises(
        OtherRanks, match=rf"^stage {second} needs 4 ranks \(stages\.{second}\.parallel\.ranks\)"
    ) as stop:
        launched_layouts(recipe, second)
    assert (stop.value.ranks, stop.value.folder, stop.value.exit_code) == (4, "", 76)
    monkeypatch.setenv("WORLD_SIZE", "4")
    layouts = launched_layouts(recipe, second)
    assert {name: layout.data_ranks for name, layout in layouts.items()} == {second: 2, third: 1}
    with pytest.raises(OtherRanks, match=rf"^stage {third} needs 1 rank "):
        launched_layouts(recipe, third)
    with pytest.raises(OtherRanks, match=rf"^stage {first} needs 3 ranks \(parallel\.ranks\), there are 4"):
        launched_layouts(resolve("demo", ["parallel.ranks=3", *own]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MeshError, match=r"stages\.long.*dense\.cp=2 needs a multiple of 2 ranks, there are 3"):
        launched_layouts(resolve("demo", ["stages.long.parallel={ranks: 3, dense: {cp: 2}}"]))


def test_a_stage_without_a_number_keeps_that_of_the_stage_before(tmp_path: Path) -> None:
    base, long = tiny_recipe(tmp_path, tmp_path).stages.values()
    four, one = ParallelConfig(ranks=4), ParallelConfig(ranks=1)
    stages = {"a": base, "b": replace(base, parallel=four), "c": base, "d": replace(long, parallel=one), "e": long}
    recipe = tiny_recipe(tmp_path, tmp_path, stages=stages)
    assert ranks_of_stages(recipe, 2) == {"a": 2, "b": 4, "c": 4, "d": 1, "e": 1}
    assert ranks_of_stages(since(recipe, "c"), 2) == {"c": 2, "d": 1, "e": 1}


@pytest.mark.parametrize(
    ("stop", "environment", "way"),
    [
        (
            OtherRanks("x", 4, "a run"),
            {},
            "the run is saved; type `torchrun --nproc-per-node 4 -m steptron resume 'a run'`",
        ),
        (OtherRanks("x", 1, "run"), {}, "the run is saved; type `steptron resume run`"),
        (OtherRanks("x", 4), {}, "type `torchrun --nproc-per-node 4 -m steptron train demo seed=1`"),
        (
            OtherRanks("x", 4, "run"),
            {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"},
            "the run is saved; start `steptron resume run` on 4 ranks, with launch/node.sh on as many nodes as they need",
        ),
        (OtherRanks("x", 4, "run"), {NEXT_VARIABLE: "/next"}, "the run is saved; its launcher starts that number"),
    ],
    ids=["torchrun", "one process", "before the start", "several nodes", "launcher"],
)
def test_the_way_on(stop: OtherRanks, environment: dict[str, str], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert way_on(stop, ["train", "demo", "seed=1"]) == way


def test_the_launcher_reads_what_rank_0_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NEXT_VARIABLE, str(tmp_path / "next"))
    assert read_next(tmp_path / "next") is None
    tell_launcher(OtherRanks("x", 8, "runs/a b"))
    assert read_next(tmp_path / "next") == (8, "runs/a b")
    assert (tmp_path / "next").read_text().split("\n")[:2] == ["8", "runs/a b"], "slurm/job.sh reads lines"
    tell_launcher(OtherRanks("x", 8))
    assert read_next(tmp_path / "next") == (8, "")
