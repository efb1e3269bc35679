"""Paths in a run's recipe, resolved so that they do not depend on the working directory.

    train:  relative path ── from the working directory ──► absolute, in the run folder's recipe.yaml
    later:  recipe.yaml ──► the path if it exists, else the same relative way from the folder's present location

Fields of the type `Location` hold a path, or a URL of fsspec, which stays unchanged.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from steptron.config import identity
from steptron.config.decode import field_types, join
from steptron.config.resolve import Tell, load_recipe, silent
from steptron.config.schema import Location, Recipe
from steptron.config.validate import validate
from steptron.errors import RecipeError

LOCAL = ("", "file", "local")
"""The protocols of this machine's file systems."""


def absolute(recipe: Recipe, kept: Recipe | None = None) -> Recipe:
    """Return the recipe with every relative path resolved from the working directory.

    `kept`: the recipe that a run already has. A relative path that equals the end of the run's own path means the run's
    own path. The command that started the run can therefore continue it from any directory.
    """
    known = locations(kept) if kept else {}

    def changed(key: str, text: str) -> str:
        own = known.get(key, "")
        return own if _is_relative(text) and _ends_with(own, text) else _absolute(text)

    return _changed(recipe, changed, "")


def load_run(folder: Path, overrides: Sequence[str] = (), tell: Tell = silent) -> Recipe:
    """Return the recipe of the run in `folder`, with overrides and without relative paths.

    A path of the run that does not exist is searched from the present location of the folder, in case both were moved
    together. Raises `RecipeError`, also if an override of run.dir names another folder.
    """
    kept, recipe = _kept_and_changed(folder, overrides, tell)
    if recipe.run.dir != kept.run.dir and Path(recipe.run.dir).resolve() != folder.resolve():
        raise RecipeError(
            f"run.dir={recipe.run.dir}: the run is in {folder}; leave run.dir out, or move the folder first and resume "
            "it there"
        )
    return _without_relative_paths(recipe, kept, folder)


def load_fork(parent: Path, name: str, overrides: Sequence[str] = (), tell: Tell = silent) -> tuple[Recipe, Recipe]:
    """Return the recipe of the run in the folder `parent`, and that of a new run called `name` that continues it, with
    overrides.

    The new run's folder is beside `parent` unless an override of run.dir names another. Paths are as in `load_run`.
    Raises `RecipeError`.
    """
    kept, recipe = _kept_and_changed(parent, overrides, tell)
    if recipe.run.name not in (kept.run.name, name):
        raise RecipeError(f"run.name={recipe.run.name}: the new run is called {name}; leave run.name out")
    own = recipe.run.dir if recipe.run.dir != kept.run.dir else ""
    folder = (
        os.path.abspath(os.path.expanduser(own))
        if own
        else os.path.join(os.path.dirname(os.path.abspath(parent)), name)
    )
    recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, name=name, dir=folder))
    validate(recipe)  # the name
    return _without_relative_paths(kept, kept, parent), _without_relative_paths(recipe, kept, parent)


def _kept_and_changed(folder: Path, overrides: Sequence[str], tell: Tell) -> tuple[Recipe, Recipe]:
    """Return the recipe in a run's folder, without and with overrides."""
    kept = load_recipe(folder / "recipe.yaml")
    return kept, load_recipe(folder / "recipe.yaml", overrides, tell) if overrides else kept


def _without_relative_paths(recipe: Recipe, kept: Recipe, folder: Path) -> Recipe:
    """Return the recipe with absolute paths. Those of `kept`, which is in `folder`, follow a folder that was moved."""
    own, before = locations(kept), identity.read(folder)

    def changed(key: str, text: str) -> str:
        found = _absolute(text)
        return (
            _followed(found, Path(before.place), folder) if before and before.place and own.get(key) == text else found
        )

    return _changed(recipe, changed, "")


def locations(recipe: Recipe) -> dict[str, str]:
    """Return the paths and URLs of a recipe by key. Empty ones are left out."""
    found: dict[str, str] = {}

    def note(key: str, text: str) -> str:
        found[key] = text
        return text

    _changed(recipe, note, "")
    return found


def _changed(value: Any, change: Callable[[str, str], str], path: str) -> Any:
    """Return a section of a recipe with every non-empty location replaced by `change(key, text)`."""
    new: dict[str, Any] = {}
    for name, annotation in field_types(type(value)).items():
        item, key = getattr(value, name), join(path, name)
        if annotation == Location and item:
            new[name] = change(key, item)
        elif dataclasses.is_dataclass(item):
            new[name] = _changed(item, change, key)
        elif isinstance(item, Mapping) and dataclasses.is_dataclass(get_args(annotation)[1]):
            new[name] = {k: _changed(member, change, join(key, k)) for k, member in item.items()}
    return dataclasses.replace(value, **new)


def _split(text: str) -> tuple[str, str]:
    """Return protocol and path. The protocol is empty for a plain path."""
    protocol, mark, rest = text.partition("://")
    return (protocol, rest) if mark else ("", text)


def _is_relative(text: str) -> bool:
    protocol, path = _split(text)
    return protocol in LOCAL and not os.path.isabs(os.path.expanduser(path))


def _absolute(text: str) -> str:
    protocol, path = _split(text)
    if protocol not in LOCAL:
        return text
    found = os.path.abspath(os.path.expanduser(path))
    return f"{protocol}://{found}" if protocol else found


def _ends_with(own: str, relative: str) -> bool:
    """Return whether the absolute path `own` may have been written as `relative`."""
    parts = [part for part in Path(os.path.normpath(_split(relative)[1])).parts if part != ".."]
    return (
        _split(own)[0] == _split(relative)[0]
        and bool(parts)
        and Path(_split(own)[1]).parts[-len(parts) :] == tuple(parts)
    )


def _followed(text: str, old: Path, folder: Path) -> str:
    """Return the location itself if it exists, else the place that the same relative way reaches from `folder`,
    formerly `old`."""
    protocol, path = _split(text)
    if protocol not in LOCAL or os.path.exists(path):
        return text
    way = os.path.relpath(os.path.realpath(path), os.path.realpath(old))
    found = os.path.normpath(os.path.join(os.path.realpath(folder), way))
    return text if not os.path.exists(found) else f"{protocol}://{found}" if protocol else found
