"""Composition: names, paths, forks, overrides in Hydra's grammar, and the way back from recipe.yaml."""

from pathlib import Path

import pytest
import steptron
from steptron.config.changes import recipe_hash
from steptron.config.decode import decode
from steptron.config.resolve import default_recipes_dir, load_recipe, resolve, to_yaml
from steptron.config.schema import RampStep, Recipe
from steptron.errors import RecipeError

SMALL = str(Path(__file__).parent / "small.yaml")
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", ["demo", "pretrain/demo", "demo.yaml", str(RECIPES / "pretrain" / "demo.yaml")])
def test_a_name_and_a_path_find_the_same_recipe(name: str) -> None:
    assert resolve(name) == resolve("demo")


def test_relative_paths_are_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fork.yaml").write_text("defaults: [/pretrain/demo, _self_]\nrun: {name: fork}\n")
    monkeypatch.chdir(tmp_path)
    assert resolve("fork.yaml").run.name == "fork"


FORK = "# @package _global_\ndefaults: [/pretrain/demo, _self_]\nrun: {name: mine}\nseed: 77\n"


@pytest.mark.parametrize("shipped", ["demo", "step3p5_mini"])
@pytest.mark.parametrize("written", ["./{}.yaml", "{}.yaml", "../here/{}.yaml", "{here}/{}.yaml"])
def test_a_file_wins_over_the_recipe_of_the_same_name(
    written: str, shipped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / f"{shipped}.yaml").write_text(FORK)
    monkeypatch.chdir(here)
    lines: list[str] = []
    recipe = resolve(written.format(shipped, here=here), tell=lines.append)
    assert (recipe.run.name, recipe.seed, lines) == ("mine", 77, [])


@pytest.mark.parametrize("name", ["demo", "pretrain/demo"])
def test_a_name_is_the_shipped_recipe_and_one_line_names_the_file_beside_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    assert resolve(name, tell=lines.append).run.name == "demo"
    assert lines == []
    Path(f"{name}.yaml").parent.mkdir(exist_ok=True)
    Path(f"{name}.yaml").write_text(FORK)
    assert resolve(name, tell=lines.append).run.name == "demo"
    (line,) = lines
    assert line.startswith(f"{name} is the recipe {RECIPES / 'pretrain' / 'demo.yaml'}, not ./{name}.yaml;")


@pytest.mark.parametrize("written", ["./demo.yaml", "./demo", "../demo.yaml", "/nowhere/demo.yaml"])
def test_a_path_without_a_file_is_no_name(written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=f"^{written}: no file and no recipe of that name"):
        resolve(written)
    if written == "./demo":
        Path("demo.yaml").write_text(FORK)
        with pytest.raises(RecipeError, match=r"nearest: \./demo\.yaml"):
            resolve(written)


def test_a_fork_anywhere_builds_on_the_recipes_folder(tmp_path: Path) -> None:
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    (folder / "fork.yaml").write_text(
        "defaults:\n  - /pretrain/demo\n  - override /optim: adamw\n  - _self_\n"
        "run: {name: fork}\nmodel: {moe: {top_k: 2}}\n"
    )
    fork, demo = resolve(str(folder / "fork.yaml"), ["seed=3"]), resolve("demo")
    assert (fork.run.name, fork.model.moe.top_k, fork.optim.matrix_optimizer, fork.seed) == ("fork", 2, "adamw", 3)
    assert fork.stages == demo.stages


def test_another_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "mine.yaml").write_text(to_yaml(resolve("demo", ["run.name=mine"])))
    (tmp_path / "pretrain" / "mine.yaml").write_text(
        "# @package _global_\n" + (tmp_path / "pretrain" / "mine.yaml").read_text()
    )
    assert resolve("mine", recipes_dir=tmp_path).run.name == "mine"


def test_recipes_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_recipes_dir() == RECIPES
    monkeypatch.setattr(steptron, "__file__", str(tmp_path / "site-packages" / "steptron" / "__init__.py"))
    assert default_recipes_dir() == tmp_path / "site-packages" / "steptron" / "_recipes"


def test_overrides_of_hydra() -> None:
    recipe = resolve(
        SMALL,
        [
            "stages.base.tokens=1.5M",
            "stages.base.mix={prose: 1.0, code: 3.0}",
            "stages.base.ramp=[{until: 10K, batch_size: 16}, {until: 20K, batch_size: 32}]",
            "+stages.last.tokens=4K",
            "+stages.last={seq_len: 64, batch_size: 2, mix: {code: 1}, lr: {peak: 1e-4}}",
            "~stages.longer",
            "model.layer_pattern=FS",
            "run.name='a name'",
            "monitor.level=off",
            "stages.base.limits.routed.4=9",
            "seed=${stages.base.seq_len}",
        ],
    )
    base = recipe.stages["base"]
    assert base.tokens == 1_500_000
    assert base.mix == {"prose": 1.0, "code": 3.0}
    assert base.ramp == (RampStep(until=10_000, batch_size=16), RampStep(until=20_000, batch_size=32))
    assert list(recipe.stages) == ["base", "last"]
    assert recipe.stages["last"].seq_len == 64
    assert base.limits.routed == {4: 9.0, 5: 7.0}
    assert (recipe.run.name, recipe.monitor.level) == ("a name", "off")
    assert recipe.seed == base.seq_len


def test_an_option_of_a_group() -> None:
    assert resolve("demo", ["optim=adamw", "optim.beta2=0.99"]).optim.matrix_optimizer == "adamw"
    assert resolve("demo", ["parallel=pp8_ep8"]).parallel.expert.ep == 8


def test_keys_of_the_schema_need_no_plus() -> None:
    recipe = resolve(
        SMALL,
        [
            "run.device=cpu",
            "stages.base.micro_batch=8",
            "stages.longer.ramp=[{until: 20K, batch_size: 1}]",
            "stages.base.ramp.0.until=32768",
            "model.rope_scaling.factor=2",
            "model.rope_scaling.original_max_positions=2048",
            "monitor.wandb.entity=team",
        ],
    )
    assert recipe.run.device == "cpu"
    assert recipe.stages["base"].ramp[0].until == 32768
    assert recipe.model.rope_scaling is not None
    assert recipe.monitor.wandb.entity == "team"


def test_stage_names_may_have_hyphens() -> None:
    assert resolve("step3p5_flash", ["stages.pre-1.tokens=14T"]).stages["pre-1"].tokens == 14 * 10**12


@pytest.mark.parametrize("name", ["demo", "step3p5_mini", "step3p5_flash"])
def test_recipe_yaml_reads_back_as_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = resolve(name, ["run.name='1e5'", "monitor.wandb.project='off'"])  # texts that YAML might take for others
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    again = load_recipe(path)
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)
    assert to_yaml(again) == to_yaml(recipe)


def test_recipe_yaml_with_overrides(tmp_path: Path) -> None:
    recipe = resolve(SMALL)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    changed = load_recipe(tmp_path / "recipe.yaml", ["stages.longer.tokens=1M", "stages.base.limits.routed.4=8"])
    assert changed.stages["longer"].tokens == 1_000_000
    assert changed.stages["base"].limits.routed == {4: 8.0, 5: 7.0}
    assert changed.model == recipe.model


def test_the_hash_is_of_what_a_run_keeps_for_life() -> None:
    recipe = resolve(SMALL)
    assert len(recipe_hash(recipe)) == 32
    for same in ("stages.base.lr.end=9e-4", "run.name=other", "parallel.dense.tp=2", "checkpoint.every=7"):
        assert recipe_hash(resolve(SMALL, [same])) == recipe_hash(recipe), same
    for other in ("model.init_std=0.3", "seed=9", "precision=bf16", "optim.matrix_optimizer=adamw"):
        assert recipe_hash(resolve(SMALL, [other])) != recipe_hash(recipe), other


def test_decode_of_the_written_yaml_needs_nothing_of_hydra() -> None:
    yaml = pytest.importorskip("yaml")
    recipe = resolve("demo")
    assert decode(Recipe, yaml.safe_load(to_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("model: [1\nb: 2\n", "line 2", id="no-yaml"),
        pytest.param("seed: 1\nseed: 2\n", "found duplicate key seed", id="duplicate-key"),
        pytest.param("- 1\n", "must be a DictConfig", id="a-list"),
        pytest.param("defaults: [/model: nothing]\n", "group model has no option 'nothing'", id="unknown-option"),
        pytest.param("defaults: [/nothing: demo]\n", "no such group", id="unknown-group"),
        pytest.param("seed: ${nothing}\n", "Interpolation key 'nothing' not found", id="interpolation"),
        pytest.param("seed: ${\n", "unfinished", id="broken-interpolation"),
        pytest.param("seed: ???\nrun: {name: a}\n", "model is not set", id="missing"),
        pytest.param("seed: \xff\n".encode("latin-1"), "cannot be read", id="no-utf-8"),
    ],
)
def test_files_that_are_no_recipes(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError) as caught:
        resolve(str(path))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("dmeo", "nearest: demo", id="misspelt"),
        pytest.param("somewhere/step3p5_min.yaml", "nearest: step3p5_mini", id="no-file"),
        pytest.param("", "no file and no recipe of that name", id="empty"),
        pytest.param(str(RECIPES), "no file and no recipe of that name", id="folder"),
        pytest.param(__file__, "a file whose name ends in .yaml", id="no-yaml"),
    ],
)
def test_recipes_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(name)
    assert message in str(caught.value)
