"""Learning rates far above the usual one: one line for each stage, with the value and the usual one."""

from pathlib import Path

import pytest
from steptron.config.high_rates import LARGEST_PEAK
from steptron.config.resolve import default_recipes_dir, load_recipe, resolve, to_yaml


def told(recipe: str, *overrides: str) -> list[str]:
    lines: list[str] = []
    resolve(recipe, overrides, tell=lines.append)
    return lines


@pytest.mark.parametrize(
    ("recipe", "stage", "factor", "warned"),
    [
        ("demo", "base", 100, True),
        ("demo", "base", 99, False),
        ("demo", "longer", 100, True),
        ("step3p5_mini", "", 1000, True),
        ("step3p5_flash", "pre-1", 100, True),
    ],
)
def test_a_peak_is_compared_with_the_recipes_own(recipe: str, stage: str, factor: float, warned: bool) -> None:
    stages = resolve(recipe).stages
    name = stage or next(iter(stages))
    peak = stages[name].lr.peak
    lines = told(recipe, f"stages.{name}.lr.peak={peak * factor}")
    assert len(lines) == warned
    for line in lines:
        assert line.startswith(
            f"warning: stages.{name}.lr.peak={peak * factor:g} is {factor:,} times the usual {peak:g};"
        )


def test_a_file_of_ones_own_is_compared_with_the_largest_shipped_peak(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    stage = "{tokens: 8K, seq_len: 64, batch_size: 4, mix: {code: 1}, lr: {peak: PEAK}}"
    text = "# @package _global_\ndefaults: [/pretrain/demo, _self_]\nstages: {mine: " + stage + "}\n"
    path.write_text(text.replace("PEAK", "0.3"))
    assert len(told(str(path))) == 1
    path.write_text(text.replace("PEAK", "0.29"))
    assert told(str(path)) == []


def test_no_shipped_recipe_is_warned_of_and_the_largest_peak_is_theirs() -> None:
    names = [file.stem for file in (default_recipes_dir() / "pretrain").glob("*.yaml")]
    assert [line for name in names for line in told(name)] == []
    assert max(stage.lr.peak for name in names for stage in resolve(name).stages.values()) == LARGEST_PEAK


def test_a_resumed_run_is_compared_with_its_own_recipe(tmp_path: Path) -> None:
    path, lines = tmp_path / "recipe.yaml", list[str]()
    path.write_text(to_yaml(resolve("demo")))
    load_recipe(path, ["stages.long.lr.peak=0.1"], lines.append)
    assert [line.split(" is ")[0] for line in lines] == ["warning: stages.long.lr.peak=0.1"]
