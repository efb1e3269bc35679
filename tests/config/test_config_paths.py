"""Paths in a recipe mean the same from every working directory."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from steptron.config import identity
from steptron.config.decode import decode, encode
from steptron.config.paths import absolute, load_fork, load_run, locations
from steptron.config.resolve import resolve, to_yaml
from steptron.config.schema import Recipe
from steptron.errors import RecipeError

SMALL = str(Path(__file__).parent / "small.yaml")
NAMES = {"path", "tokenizer", "mirror_to", "init_from", "store", "token_file", "certificate"}
"""Fields of the schema that say where something is."""


def recipe_at(root: Path | str) -> Recipe:
    """Everything that can be a path is one, below `root`."""
    values = encode(resolve(SMALL))

    def fill(section: dict[str, Any]) -> None:
        for name, value in section.items():
            if isinstance(value, dict):
                fill(value)
            elif name in NAMES and isinstance(value, str):
                section[name] = f"{root}/{name}"

    fill(values)
    return decode(Recipe, values)


def keep(recipe: Recipe, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    (folder / identity.NAME).write_text(identity.at_start(None, folder).to_json())


def test_every_field_that_is_a_path_is_known_as_one():
    found = locations(recipe_at("somewhere"))
    assert {key.rpartition(".")[2] for key in found} == NAMES
    assert set(found.values()) == {f"somewhere/{name}" for name in NAMES}


def test_relative_paths_continue_from_the_working_directory_and_the_rest_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute(recipe_at("a/../b")) == recipe_at(tmp_path / "b")
    for place in ("/somewhere/else", "s3://bucket/runs", "simplecache::s3://bucket"):
        assert absolute(recipe_at(place)) == recipe_at(place)
    assert absolute(recipe_at("file://b")) == recipe_at(f"file://{tmp_path}/b")
    assert absolute(recipe_at("~/b")) == recipe_at(f"{Path.home()}/b")
    assert absolute(resolve(SMALL)).monitor.store == "", "what is not set stays so"


def test_a_relative_path_of_the_command_that_started_the_run_is_the_runs_own(tmp_path, monkeypatch):
    kept = recipe_at(tmp_path / "project/data")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    for spelling in ("data", "./data", "../data", "../../project/data"):
        assert absolute(recipe_at(spelling), kept=kept) == kept, spelling
    assert absolute(recipe_at("new"), kept=kept) == recipe_at(tmp_path / "other/new")
    assert absolute(recipe_at(tmp_path / "new/data"), kept=kept) == recipe_at(tmp_path / "new/data")


def test_a_run_is_read_the_same_from_anywhere_and_overrides_continue_from_here(tmp_path, monkeypatch):
    keep(recipe_at(tmp_path / "data"), tmp_path / "run")
    for place, spelling in ((tmp_path, "run"), (tmp_path / "run", "."), (Path("/"), str(tmp_path / "run"))):
        monkeypatch.chdir(place)
        assert load_run(Path(spelling)) == recipe_at(tmp_path / "data")
        assert load_run(Path(spelling), ["data.tokenizer=t.json"]).data.tokenizer == os.path.abspath("t.json")


def test_what_was_moved_with_the_folder_is_found_and_what_was_not_stays(tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    for name in NAMES:
        (project / "data" / name).mkdir()
    keep(recipe_at(project / "data"), project / "runs" / "one")
    (project / "runs" / "one").rename(tmp_path / "one")
    monkeypatch.chdir("/")
    assert load_run(tmp_path / "one") == recipe_at(project / "data"), "the folder alone was moved"
    (tmp_path / "one").rename(project / "runs" / "one")
    project.rename(tmp_path / "archive")
    moved = tmp_path / "archive" / "runs" / "one"
    assert load_run(moved) == recipe_at(tmp_path / "archive" / "data"), "all of it was moved"
    wrong = f"{project}/data/other"
    assert load_run(moved, [f"checkpoint.init_from={wrong}"]).checkpoint.init_from == wrong, (
        "what is asked for is not replaced"
    )
    (tmp_path / "archive" / "data" / "init_from").rmdir()
    assert load_run(moved).checkpoint.init_from == f"{project}/data/init_from", "what is nowhere is named as it was"


def test_an_override_of_the_folder_that_names_another_is_refused(tmp_path, monkeypatch):
    keep(resolve(SMALL), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for spelling in ("run", "run/", str(tmp_path / "run"), "other/../run"):
        recipe = load_run(Path("run"), [f"run.dir={spelling}"])
        assert dataclasses.replace(recipe.run, dir="") == dataclasses.replace(load_run(Path("run")).run, dir="")
    with pytest.raises(RecipeError, match=r"run\.dir=other: the run is in run; leave run\.dir out, or move the folder"):
        load_run(Path("run"), ["run.dir=other"])


def test_a_fork_has_its_name_a_folder_beside_its_parents_and_its_parents_data(tmp_path, monkeypatch):
    parent = tmp_path / "runs" / "first"
    keep(recipe_at("data"), parent)
    monkeypatch.chdir(tmp_path)
    old, fork = load_fork(Path("runs/first"), "second")
    assert old == recipe_at(tmp_path / "data")
    run = dataclasses.replace(old.run, name="second", dir=str(tmp_path / "runs" / "second"))
    assert fork == dataclasses.replace(old, run=run)
    old, fork = load_fork(parent, "second", ["run.dir=elsewhere/x", "seed=7"])
    assert (fork.run.dir, fork.seed, old.seed) == (str(tmp_path / "elsewhere" / "x"), 7, 0)
    with pytest.raises(RecipeError, match=r"^run\.name=third: the new run is called second; leave run\.name out$"):
        load_fork(parent, "second", ["run.name=third"])
    with pytest.raises(RecipeError, match=r"^run\.name=a/b must be a plain folder name"):
        load_fork(parent, "a/b")
