"""Overrides of values, in Hydra's grammar: `key=value`, `++key=value`, `+key=value`, `~key`.

    key=value    the key must be in the schema; a stage, source or other member must exist
    ++key=value  adds the member too          +key=value  adds it, and is refused if it exists
    key={…}      a mapping whose keys are names is emptied first (compose.py); + adds to it

They are made in their order, on the merged files. Overrides of groups, `model=mini`, are Hydra's.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from steptron.config.compose import empty, mappings, member
from steptron.config.decode import field_types, join, strip_optional, unknown_key
from steptron.config.schema import Recipe
from steptron.errors import RecipeError, nearest


def parse(overrides: Sequence[str]) -> list[Override]:
    """Return the overrides as Hydra reads them, sweeps among them. Raises `RecipeError` for one that does not parse."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = first_line(str(error).replace(f"Error parsing override '{text}'", ""))
            raise RecipeError(
                f"{text}: not an override ({reason}); write key=value, +key=value, ~key, or group=name"
            ) from error
        if override.is_hydra_override():
            raise RecipeError(
                f"{text}: Hydra's own settings are not part of a recipe; the run folder is set with run.dir=…"
            )
        parsed.append(override)
    return parsed


def refuse_sweeps(overrides: Sequence[Override]) -> None:
    """Raise `RecipeError` for an override with several values."""
    for override in overrides:
        if override.is_sweep_override():
            raise RecipeError(
                f"{override.input_line}: a run takes one value for each key; write a list as [a,b], and text with "
                "commas as 'a,b'; steptron sweep trains one run for each value"
            )


def make(config: DictConfig, override: Override, before: Any) -> None:
    """Make one override in `config`; `before` is the recipe before all of them, in plain values.

    Raises `RecipeError`, and what OmegaConf raises.
    """
    key, value, kind = override.key_or_group, override.value(), override.type
    if override.package is not None or "/" in key:
        raise RecipeError(f"{override.input_line}: there is no group {key} in the recipes folder")
    if kind in (OverrideType.CHANGE, OverrideType.DEL):
        check_key(key, before, OmegaConf.to_container(config, resolve=False))
    if kind is OverrideType.DEL:
        return _remove(config, key, value)
    if kind is OverrideType.ADD:
        if OmegaConf.select(config, key) is not None and not isinstance(value, dict | list):
            raise RecipeError(f"{key}: the recipe has it already; leave out the + to change it")
    else:
        parts = _parts(key)
        annotation: Any = Recipe
        for part in parts:
            annotation = member(annotation, part)
        for path in mappings(annotation, value, parts) if annotation is not None else ():
            empty(config, path)
    OmegaConf.update(config, key, value, merge=True, force_add=True)


def _remove(config: DictConfig, key: str, value: Any) -> None:
    present = OmegaConf.select(config, key)
    if present is None:
        raise RecipeError(f"~{key}: the recipe does not have it, so it cannot be removed; leave this override out")
    if value is not None and value != present:
        raise RecipeError(f"~{key}={value}: the recipe has {key}={present}, so it is not removed; write ~{key}")
    above, _, last = key.rpartition(".")
    node = OmegaConf.select(config, above) if above else config
    del node[last]


def _parts(key: str) -> list[str]:
    return re.split(r"[.\[]", key.replace("]", ""))


def check_key(key: str, *recipes: Any) -> None:
    """Raise the error for a key that is not in the schema, or that names a stage, source or other member that none of
    these recipes has."""
    annotation: Any = Recipe
    nodes = list(recipes)
    path = ""
    parts = _parts(key)
    for i, part in enumerate(parts):
        annotation, _ = strip_optional(annotation)
        origin = get_origin(annotation)
        names = {str(name): name for node in nodes if isinstance(node, Mapping) for name in node}
        if is_dataclass(annotation):
            known = field_types(annotation)  # pyright: ignore[reportArgumentType]
            if part not in known:
                raise unknown_key(path, part, known, ".".join(parts[i + 1 :]))
            annotation, name = known[part], part
        elif origin is dict:
            if part not in names:
                raise RecipeError(
                    f"{join(path, part)}: {path} has no '{part}'; {nearest(part, names)}; a new one is added with +"
                )
            annotation, name = get_args(annotation)[1], names[part]
        elif origin is tuple:
            length = max((len(node) for node in nodes if isinstance(node, list)), default=0)
            if not part.isdecimal() or int(part) >= length:
                raise RecipeError(
                    f"{join(path, part)}: {path} is a list of {length}; '{part}' is not the index of an item"
                )
            annotation, name = get_args(annotation)[0], int(part)
        else:
            raise RecipeError(f"{key}: {path} is a value, it has no key '{part}'")
        nodes = [found for node in nodes if (found := _item(node, name)) is not None]
        path = join(path, part)


def _item(node: Any, name: Any) -> Any:
    if isinstance(node, Mapping):
        return node.get(name)
    return node[name] if isinstance(node, list) and name < len(node) else None


def first_line(text: str) -> str:
    """Return the first line of a message that is not empty."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
