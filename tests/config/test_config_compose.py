"""Mappings whose keys are names: given whole they replace, a single key changes one, + adds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from steptron.config.resolve import resolve
from steptron.config.schema import Recipe, SourceConfig
from steptron.errors import RecipeError

STAGE = "{tokens: 8K, seq_len: 64, batch_size: 4, mix: {code: 1}, lr: {peak: 1e-3}}"
HEAD = "# @package _global_\ndefaults: [/pretrain/demo, _self_]\n"


def base(*overrides: str) -> Any:
    return resolve("demo", overrides).stages["base"]


@pytest.mark.parametrize("plus", ["", "++"])
@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("stages.base.mix={code: 1}", "mix", {"code": 1.0}),
        ("stages.base={mix: {code: 1}}", "mix", {"code": 1.0}),
        ("stages.base.limits.routed={5: 3}", "limits.routed", {5: 3.0}),
        ("stages.base.limits={routed: {5: 3}}", "limits.routed", {5: 3.0}),
        ("stages.base.limits.shared={}", "limits.shared", {}),
    ],
)
def test_a_whole_mapping_replaces_and_nothing_else_changes(plus: str, override: str, field: str, value: Any) -> None:
    found, shipped = base(plus + override), base()
    section, _, name = field.rpartition(".")
    if section:
        assert found == replace(shipped, limits=replace(shipped.limits, **{name: value}))
    else:
        assert found == replace(shipped, **{name: value})


@pytest.mark.parametrize(
    ("overrides", "mix"),
    [
        (["stages.base.mix.code=1"], {"prose": 0.8, "code": 1.0}),
        (["stages.base.mix={code: 1}", "stages.base.mix.prose=2"], {"prose": 2.0, "code": 1.0}),
        (["stages.base.mix.prose=2", "stages.base.mix={code: 1}"], {"code": 1.0}),
        (["stages.base.mix={prose: 3}", "stages.base.mix={code: 1}"], {"code": 1.0}),
        (["+stages.base.mix={more: 1}", "+data.sources.more.path=x"], {"prose": 0.8, "code": 0.2, "more": 1.0}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_single_key_changes_one_and_plus_adds(overrides: list[str], mix: dict[str, float]) -> None:
    assert base(*overrides).mix == mix


@pytest.mark.parametrize(("plus", "kept"), [("", []), ("++", []), ("+", ["base", "long", "longer"])])
def test_all_stages_in_one_override(plus: str, kept: list[str]) -> None:
    recipe = resolve("demo", [f"{plus}stages={{mine: {STAGE}}}"])
    assert list(recipe.stages) == [*kept, "mine"]
    assert recipe.stages["mine"].mix == {"code": 1.0}


def test_sections_are_still_merged_as_in_hydra() -> None:
    model, shipped = resolve("demo", ["model={moe: {top_k: 2}}"]).model, resolve("demo").model
    assert model == replace(shipped, moe=replace(shipped.moe, top_k=2))


def test_a_fork_with_stages_and_sources_of_its_own_has_no_others(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{HEAD}stages: {{mine: {STAGE}}}\ndata: {{sources: {{code: {{path: 'x'}}}}}}\n")
    recipe, shipped = resolve(str(path)), resolve("demo")
    assert list(recipe.stages) == ["mine"]
    assert recipe.data == replace(shipped.data, sources={"code": SourceConfig(path="x")})
    assert recipe.model == shipped.model
    assert resolve(str(path), ["stages.mine.tokens=16K", "stages.mine.mix.code=3"]).stages["mine"].tokens == 16_000


def test_a_stage_of_the_same_name_is_not_mixed_with_the_one_of_the_base(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{HEAD}stages: {{base: {STAGE}}}\n")
    stages = resolve(str(path)).stages
    assert list(stages) == ["base"]
    assert (stages["base"].mix, stages["base"].limits.routed, stages["base"].ramp) == ({"code": 1.0}, {}, ())


def test_a_part_of_a_stage_in_a_fork_is_refused_with_the_missing_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{HEAD}stages: {{base: {{tokens: 800K}}}}\n")
    with pytest.raises(RecipeError, match=r"^stages\.base\.seq_len is not set.*`stages` in a file replaces all stages"):
        resolve(str(path))


def test_forks_of_forks_replace_one_after_another(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text(f"{HEAD}stages: {{first: {STAGE}}}\n")
    (tmp_path / "second.yaml").write_text("defaults: [first, _self_]\nseed: 3\n")
    (tmp_path / "third.yaml").write_text(f"defaults: [second, _self_]\nstages: {{third: {STAGE}}}\n")
    assert list(resolve(str(tmp_path / "second.yaml")).stages) == ["first"]
    assert list(resolve(str(tmp_path / "third.yaml")).stages) == ["third"]


def test_a_group_file_changes_members_and_replaces_what_is_inside(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "mine.yaml").write_text("defaults: [demo, _self_]\nbase: {tokens: 800K, mix: {code: 1}}\n")
    (tmp_path / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [/pretrain/demo, override /stages: mine, _self_]\nrun: {name: mine}\n"
    )
    found, shipped = resolve(str(tmp_path / "mine.yaml")), resolve("demo")
    base = replace(shipped.stages["base"], tokens=800_000, mix={"code": 1.0})
    assert found.stages == {**shipped.stages, "base": base}
    assert list(found.stages) == list(shipped.stages)


def test_options_of_one_group_are_merged_as_in_hydra(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "more.yaml").write_text("sources: {more: {path: x}}\n")
    (tmp_path / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [/pretrain/demo, override /data: [demo, more], _self_]\n"
    )
    recipe: Recipe = resolve(str(tmp_path / "mine.yaml"))
    assert list(recipe.data.sources) == ["prose", "code", "more"]
