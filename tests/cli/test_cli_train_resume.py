"""train, resume and fork hand over a recipe, and call the loop until the run is at its end. The loop is a stub here."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from steptron.cli.main import main
from steptron.config.paths import absolute
from steptron.config.resolve import resolve, to_yaml
from steptron.config.schema import Recipe
from steptron.train.run_folder import run_dir
from steptron.train.signals import Signals

SMALL = str(Path(__file__).parents[1] / "config" / "small.yaml")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    seen: list[tuple] = []

    @contextmanager
    def new_run(recipe: Recipe, signals: Signals, or_resume: bool) -> Iterator[tuple[str, int]]:
        seen.append((recipe, or_resume))
        yield "a run", False

    @contextmanager
    def resumed_run(
        recipe: Recipe, folder: Path, changed: dict, step: int | None, signals: Signals
    ) -> Iterator[tuple[str, int]]:
        seen.append((recipe, folder, changed, step))
        yield "a run", True

    @contextmanager
    def next_layout(folder: Path, signals: Signals) -> Iterator[tuple[str, bool]]:
        seen.append((folder,))
        yield "a run", True

    @contextmanager
    def forked_run(
        recipe: Recipe, parent: Path, old: Recipe, step: int | None, signals: Signals
    ) -> Iterator[tuple[str, bool]]:
        seen.append((recipe, parent, old, step))
        yield "a run", False

    start, loop = ModuleType("steptron.train.start"), ModuleType("steptron.train.loop")
    start.new_run, start.resumed_run, start.forked_run = new_run, resumed_run, forked_run  # pyright: ignore[reportAttributeAccessIssue]
    start.next_layout = next_layout  # pyright: ignore[reportAttributeAccessIssue]
    loop.run_stages = lambda run, finished, profiled=None: finished  # pyright: ignore[reportAttributeAccessIssue]
    loop.rehearse = lambda run, counters: None  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "steptron.train.start", start)
    monkeypatch.setitem(sys.modules, "steptron.train.loop", loop)
    return seen


def test_train(calls: list[tuple]) -> None:
    assert main(["train", SMALL, "seed=5"]) == 0
    assert calls == [(resolve(SMALL, ["seed=5"]), False), (run_dir(resolve(SMALL).run),)], "and its next layout"
    assert main(["train", SMALL, "--or-resume"]) == 0
    assert calls[2] == (resolve(SMALL), True)


def test_resume(calls: list[tuple], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(to_yaml(resolve(SMALL)))
    assert main(["resume", str(tmp_path), "stages.longer.tokens=1M"]) == 0
    recipe, folder, changed, step = calls[0]
    assert recipe == absolute(resolve(SMALL, ["stages.longer.tokens=1M"]))
    assert folder == tmp_path
    assert changed == {"stages.longer.tokens": [150_000, 1_000_000]}
    assert step is None
    assert main(["resume", str(tmp_path), "--step", "12"]) == 0
    assert calls[1][2:] == ({}, 12)


def test_fork(calls: list[tuple], tmp_path: Path) -> None:
    parent = tmp_path / "first"
    parent.mkdir()
    (parent / "recipe.yaml").write_text(to_yaml(resolve(SMALL)))
    assert main(["fork", str(parent), "second", "--step", "12", "stages.longer.lr.peak=1e-4"]) == 0
    (recipe, folder, old, step), following = calls
    assert following == (tmp_path / "second",), "and its next layout"
    assert (recipe.run.name, recipe.stages["longer"].lr.peak) == ("second", 1e-4)
    assert (folder, step) == (parent, 12)
    assert old == absolute(resolve(SMALL))
