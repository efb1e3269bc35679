"""Overrides beside Hydra's own composition, their order, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from steptron.config import compose as files
from steptron.config.resolve import default_recipes_dir, resolve
from steptron.errors import RecipeError

ROOT = default_recipes_dir()


def hydras_own(name: str, overrides: list[str]) -> Any:
    """Return what `hydra.compose` makes of a recipe, in plain values."""
    with initialize_config_dir(str(ROOT), version_base="1.3"):
        return OmegaConf.to_container(compose(f"pretrain/{name}", overrides=overrides), resolve=True)


def ours(name: str, overrides: list[str]) -> Any:
    from steptron.config.overrides import make

    config, changes = files.composed([ROOT], f"pretrain/{name}", overrides)
    for change in changes:
        make(config, change, OmegaConf.to_container(config))
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("name", ["demo", "step3p5_mini", "step3p5_flash"])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optim=adamw", "optim.weight_decay=0.3", "seed=7"],
        ["+parallel=pp8_ep8"],
        ["run.name='a, \"b\"'", "++model.init_std=1e-3", "model.layer_pattern=FS", "+checkpoint={every: 3}"],
        ["seed=${model.num_layers}", "~optim", "data.tokenizer=\\${x}"],
        ["++data.build_command=null", "+monitor.probes=[a,b]"],
    ],
    ids=lambda value: " ".join(value) or "none",
)
def test_files_and_overrides_give_what_hydra_gives(name: str, overrides: list[str]) -> None:
    try:
        expected = hydras_own(name, overrides)
    except Exception as error:
        with pytest.raises((type(error), RecipeError)):
            ours(name, overrides)
    else:
        assert ours(name, overrides) == expected


def test_a_recipe_is_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(path: Path) -> Any:
        calls.append(str(path))
        return load(path)

    load = OmegaConf.load
    monkeypatch.setattr(files.OmegaConf, "load", counted)
    recipe = resolve("demo", ["seed=3", "model.init_std=0.1", "stages.base.mix={code: 1}"])
    assert (recipe.seed, recipe.model.init_std) == (3, 0.1)
    assert len(calls) == len(set(calls)), "each file is merged once"


def test_overrides_are_made_in_their_order() -> None:
    assert resolve("demo", ["seed=1", "++seed=2", "seed=3"]).seed == 3
    stage = "+stages.more={tokens: 1K, seq_len: 8, batch_size: 1, mix: {code: 1}, lr: {peak: 1e-4}}"
    assert resolve("demo", [stage, "stages.more.tokens=2K"]).stages["more"].tokens == 2000
    with pytest.raises(RecipeError, match=r"^stages\.more: stages has no 'more'; .*is added with \+$"):
        resolve("demo", ["stages.more.tokens=2K", stage])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+nothing/here=x", r"^\+nothing/here=x: there is no group nothing/here"),
        ("nothing@model=x", r"^nothing@model=x: there is no group nothing"),
        ("~optim.clip_norm=2", r"^~optim\.clip_norm=2: the recipe has optim\.clip_norm=1\.0, so it is not removed"),
        ("~stages.other", r"^stages\.other: stages has no 'other'"),
        ("+seed=4", r"^seed: the recipe has it already; leave out the \+"),
        ("model=3", r"Config group override must be a string or a list. Got int$"),
        ("seed=1,2", r"^seed=1,2: a run takes one value for each key; .*steptron sweep"),
        ("hydra.run.dir=x", r"^hydra\.run\.dir=x: Hydra's own settings are not part of a recipe"),
    ],
)
def test_what_cannot_be_made_is_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve("demo", [override])
