"""The files of a recipe, in Hydra's order, merged with one rule of ours: a mapping whose keys are names is one value.

    recipe file, group=name ──Hydra──▶ list of files ──merge one after another──▶ config
    a file with defaults    ──▶ empty the mappings that the file itself gives, then merge it

Such mappings are `stages`, `data.sources`, a stage's `mix` and `limits`. Hydra alone would merge them with the names
that were there before, and a run would train on stages and sources that nobody has asked for.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra import initialize_config_dir
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from steptron.config.decode import field_types, strip_optional
from steptron.config.schema import Recipe
from steptron.errors import RecipeError


def composed(folders: Sequence[Path], name: str, overrides: Sequence[str]) -> tuple[DictConfig, list[Override]]:
    """Return the merged files of the recipe `name`, and the overrides that change values, which are still to be made.

    `folders`: the folder of the recipe's file, then others with groups and recipes. Raises `RecipeError`, and what
    Hydra, OmegaConf and YAML raise.
    """
    search = ["file://{}".format(re.sub(r"([\\'])", r"\\\1", str(folder))) for folder in folders[1:]]
    lines = [*([f"hydra.searchpath=['{search[0]}']"] if search else []), *overrides]
    with initialize_config_dir(str(folders[0]), version_base="1.3"):
        found = GlobalHydra.instance().config_loader().compute_defaults_list(name, lines, RunMode.RUN)
    config = OmegaConf.create()
    for default in found.defaults:
        if not default.config_path.startswith("hydra/"):
            _merge(config, default, folders)
    return config, [override for override in found.config_overrides if not override.is_hydra_override()]


def member(annotation: Any, name: str) -> Any:
    """Return the type of a member of a section or of a mapping, or None for a value and an unknown key."""
    annotation, _ = strip_optional(annotation)
    if is_dataclass(annotation):
        return field_types(annotation).get(name)  # pyright: ignore[reportArgumentType]
    return get_args(annotation)[1] if get_origin(annotation) is dict else None


def mappings(annotation: Any, value: Any, path: list[str]) -> Iterator[list[str]]:
    """Yield the paths of the outermost mappings in `value`, which is the value of the recipe's key `path`."""
    annotation, _ = strip_optional(annotation)
    if not isinstance(value, Mapping):
        return
    if get_origin(annotation) is dict:
        yield path
    elif is_dataclass(annotation):
        for name, item in value.items():
            inner = member(annotation, str(name))
            if inner is not None:
                yield from mappings(inner, item, [*path, str(name)])


def empty(config: DictConfig, path: list[str]) -> None:
    """Set the mapping at `path` to null, so that the next merge replaces it."""
    *above, last = path
    for part in above:
        inner = None if OmegaConf.is_interpolation(config, part) else config.get(part)
        if not isinstance(inner, DictConfig):
            return
        config = inner
    config[last] = None


def _merge(config: DictConfig, default: ResultDefault, folders: Sequence[Path]) -> None:
    """Merge a file of Hydra's list into `config`, at its package."""
    name = f"{str(default.config_path).removesuffix('.yaml')}.yaml"
    path = next(folder / name for folder in folders if (folder / name).is_file())
    content = OmegaConf.load(path)
    if not isinstance(content, DictConfig):
        raise RecipeError(f"{path}: a recipe is a mapping, key: value")
    content.pop("defaults", None)
    package = "" if default.package in (None, "_global_") else str(default.package)
    if default.is_self:
        for mapping in _below(package, content):
            empty(config, mapping)
    if package:
        OmegaConf.update(config, package, content, merge=True, force_add=True)
    else:
        config.merge_with(content)


def _below(package: str, content: DictConfig) -> Iterator[list[str]]:
    """Yield the paths of the mappings that a file gives, below the place where its content goes."""
    parts = package.split(".") if package else []
    annotation: Any = Recipe
    for part in parts:
        annotation = member(annotation, part)
    values = OmegaConf.to_container(content, resolve=False)
    if not isinstance(values, Mapping) or annotation is None:
        return
    if is_dataclass(annotation):
        yield from mappings(annotation, values, parts)
    else:  # a file in the group stages gives members, and not the whole mapping
        for name, item in values.items():
            yield from mappings(member(annotation, str(name)), item, [*parts, str(name)])
