"""Every recipe and every option of every group resolves, and is what its checked-in twin says."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from steptron.config.decode import decode, strip_optional
from steptron.config.resolve import resolve, to_yaml
from steptron.config.schema import Recipe, StageConfig

ROOT = Path(__file__).parents[2] / "recipes"
TWINS = Path(__file__).parent / "resolved"
RECIPES = sorted(path.stem for path in (ROOT / "pretrain").glob("*.yaml"))
OPTIONS = sorted(path.relative_to(ROOT) for path in ROOT.glob("*/*.yaml") if path.parent.name != "pretrain")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_its_twin(name: str, refresh_twins: bool) -> None:
    resolved = to_yaml(resolve(name))
    twin = TWINS / f"{name}.yaml"
    if refresh_twins:
        twin.parent.mkdir(exist_ok=True)
        twin.write_text(resolved)
    assert twin.exists(), "a new recipe: python -m pytest tests/recipes --refresh-twins"
    assert resolved == twin.read_text(), "if the change is meant: python -m pytest tests/recipes --refresh-twins"


def test_no_twin_is_left_over() -> None:
    assert sorted(path.stem for path in TWINS.glob("*.yaml")) == RECIPES


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_option_decodes_as_its_section(option: Path) -> None:
    group = option.parent.name
    content = OmegaConf.to_container(OmegaConf.load(ROOT / option))
    if group == "stages":
        assert isinstance(content, dict)
        for name, stage in content.items():
            decode(StageConfig, stage, f"stages.{name}")
    else:
        section, _ = strip_optional(Recipe.__annotations__[group])
        decode(section, content, group)


def test_every_option_is_used_or_named() -> None:
    """Options that no recipe takes are there for the command line; they fit the demo."""
    for override in ("optim=adamw", "monitor=off", "monitor=full", "checkpoint=default", "parallel=pp8_ep8"):
        resolve("demo", [override])


def test_demo_has_the_published_curriculum_in_small() -> None:
    stages = list(resolve("demo").stages.values())
    lengths = [stage.seq_len for stage in stages]
    assert lengths == [lengths[0], 8 * lengths[0], 32 * lengths[0]]
    prose = [stage.mix["prose"] / sum(stage.mix.values()) for stage in stages]
    assert prose == sorted(prose, reverse=True)
    assert prose[0] > 0.5 > prose[-1]
    assert {stage.seq_len * stage.batch_size for stage in stages} == {lengths[0] * stages[0].batch_size}
    assert [stage.balance.freeze_router for stage in stages] == [False, False, True]


def test_demo_runs_on_two_processes() -> None:
    for stage in resolve("demo").stages.values():
        for size in (stage.batch_size, *(step.batch_size for step in stage.ramp)):
            assert size % (2 * stage.micro_batch) == 0
