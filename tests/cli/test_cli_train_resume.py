"""train and resume hand over a recipe, and their exit code is the loop's. The loop is a stub here."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from steptron.cli.main import main
from steptron.config.resolve import resolve, to_yaml
from steptron.config.schema import Recipe

SMALL = str(Path(__file__).parents[1] / "config" / "small.yaml")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    seen: list[tuple] = []

    def train(recipe: Recipe) -> int:
        seen.append((recipe,))
        return 3

    def resume(recipe: Recipe, folder: Path, changes: dict) -> int:
        seen.append((recipe, folder, changes))
        return 75

    loop = ModuleType("steptron.train.loop")
    loop.train, loop.resume = train, resume  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "steptron.train.loop", loop)
    return seen


def test_train(calls: list[tuple]) -> None:
    assert main(["train", SMALL, "seed=5"]) == 3
    assert calls == [(resolve(SMALL, ["seed=5"]),)]


def test_resume(calls: list[tuple], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(to_yaml(resolve(SMALL)))
    assert main(["resume", str(tmp_path), "stages.longer.tokens=1M"]) == 75
    recipe, folder, changes = calls[0]
    assert recipe == resolve(SMALL, ["stages.longer.tokens=1M"])
    assert folder == tmp_path
    assert changes == {"stages.longer.tokens": [150_000, 1_000_000]}
