"""Stages with a layout of their own: the run is built again at their border, and trains on the same tokens as ever.

On one process, where layouts differ in what is recomputed. Layouts of several ranks are in test_train_layouts.py.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from steptron.config.layouts import by_layout, part_with
from steptron.config.resolve import resolve
from steptron.config.schema import CheckpointConfig, ParallelConfig, Recipe, RecomputeConfig
from steptron.errors import MeshError
from steptron.train.process_group import launched_layouts

from small_runs import column, ledger, metrics, steptron, write_recipe
from tiny import tiny_recipe

OTHER = ParallelConfig(recompute=RecomputeConfig(parts=("ffn",)))
NAMES = ("loss", "mtp_loss", "balance_loss", "total_loss", "grad_norm", "tokens")


def bordered(corpus: Path, run_dir: Path, parallel: ParallelConfig | None) -> Recipe:
    """Two stages of five steps, the second one in another layout; checkpoints at steps 3, 5, 6, 9 and 10."""
    recipe = tiny_recipe(corpus, run_dir, checkpoint=CheckpointConfig(every=3, keep=9))
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
