"""Composition by Hydra, with one rule of ours: a mapping whose keys are names is one value.

    file with defaults ──▶ what its defaults bring ──▶ drop the mappings that the file itself gives ──▶ merge the file
    key={…}, ++key={…} ──▶ ++path=null for every mapping in it ──▶ the override      +key={…} adds, as in Hydra

Such mappings are `stages`, `data.sources`, a stage's `mix` and `limits`. Hydra alone would merge them with the names
that were there before, and a run would train on stages and sources that nobody has asked for.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from steptron.config.decode import field_types, strip_optional
from steptron.config.schema import Recipe


def composed(folder: Path, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the nested dicts and lists of a recipe file with its defaults and overrides, interpolations resolved.

    Raises what Hydra, OmegaConf and YAML raise.
    """
    with initialize_config_dir(str(folder), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None, "Hydra is initialised by the line above"
        hydra.config_loader = _Loader(hydra.config_loader)
        found = OmegaConf.to_container(compose(name, overrides=list(overrides)), resolve=True)
    assert isinstance(found, dict), "Hydra accepts mappings only as primary configs"
    return found  # pyright: ignore[reportReturnType]


def lines_of(override: Override, values: Mapping[str, Any]) -> list[str]:
    """Return what Hydra gets for `key=value` and `++key=value`: every mapping that the value gives
    whole is emptied first.

    `stages.base.mix={code: 1}` empties `stages.base.mix`, and `stages.base={mix: {code: 1}}` does too. `values`: the
    recipe without changes of values.
    """
    key, value, text = override.key_or_group, override.value(), override.input_line
    assert text is not None, "an override that was parsed keeps its text"
    parts = key.replace("]", "").replace("[", ".").split(".")
    annotation: Any = Recipe
    for part in parts:
        annotation = _member(annotation, part)
    emptied = list(_mappings(annotation, value, parts)) if annotation is not None else []
    if len(parts) > 1 or not isinstance(value, Mapping):
        return [*(f"++{'.'.join(path)}=null" for path in emptied), f"++{text.removeprefix('++')}"]
    # The key may be the name of a group too, and Hydra takes ++ for its members only.
    present = values.get(key) or {}
    return [
        *(f"~{key}.{name}" for name in present if emptied == [parts]),
        *(f"++{'.'.join(path)}=null" for path in emptied if path != parts),
        *(f"++{key}.{name}={Override._get_value_element_as_str(item)}" for name, item in _items(override)),
    ]


def _items(override: Override) -> list[tuple[str, Any]]:
    """Return the members of a mapping with their quotes, as the override's text has them."""
    assert isinstance(override._value, dict), "the override's value is a mapping"
    return [(Override._get_value_element_as_str(name), item) for name, item in override._value.items()]


@dataclass
class _Cut(ResultDefault):
    """An entry in Hydra's list of files: it sets the mappings of the file that follows to null."""


class _Loader(ConfigLoaderImpl):
    """Hydra's loader. Before it merges what a file with defaults gives itself, it drops the mappings in that."""

    def __init__(self, loader: ConfigLoader) -> None:
        assert isinstance(loader, ConfigLoaderImpl), "Hydra has one loader"
        super().__init__(loader.config_search_path)

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: Any) -> DictConfig:
        with_cuts: list[ResultDefault] = []
        for default in defaults:
            if default.is_self and default.config_path != "hydra/config":
                with_cuts.append(_Cut(**vars(default)))
            with_cuts.append(default)
        return super()._compose_config_from_defaults_list(with_cuts, repo)

    def _load_single_config(self, default: ResultDefault, repo: Any) -> ConfigResult:
        loaded = super()._load_single_config(default, repo)
        if not isinstance(default, _Cut):
            return loaded
        cut = OmegaConf.create()
        for path in _below(default.package or "", loaded.config):
            node = cut
            for part in path[:-1]:
                if part not in node:
                    node[part] = {}
                node = node[part]
            node[path[-1]] = None
        return ConfigResult(provider=loaded.provider, path=loaded.path, config=cut, header=loaded.header)


def _below(package: str, config: Any) -> Iterator[list[str]]:
    """Yield the paths of the mappings that a file gives, below the place where its content goes."""
    parts = package.split(".") if package and package != "_global_" else []
    annotation: Any = Recipe
    for part in parts:
        annotation, config = _member(annotation, part), config.get(part)
    values = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else None
    if not isinstance(values, Mapping) or annotation is None:
        return
    if is_dataclass(annotation):
        yield from _mappings(annotation, values, parts)
    else:  # a file in the group stages gives members, and not the whole mapping
        for name, item in values.items():
            yield from _mappings(_member(annotation, str(name)), item, [*parts, str(name)])


def _mappings(annotation: Any, value: Any, path: list[str]) -> Iterator[list[str]]:
    """Yield the paths of the outermost mappings in `value`, which is the value of the recipe's key `path`."""
    annotation, _ = strip_optional(annotation)
    if not isinstance(value, Mapping):
        return
    if get_origin(annotation) is dict:
        yield path
    elif is_dataclass(annotation):
        for name, item in value.items():
            member = _member(annotation, str(name))
            if member is not None:
                yield from _mappings(member, item, [*path, str(name)])


def _member(annotation: Any, name: str) -> Any:
    """Return the type of a member of a section or of a mapping, or None for a value and an unknown key."""
    annotation, _ = strip_optional(annotation)
    if is_dataclass(annotation):
        return field_types(annotation).get(name)  # pyright: ignore[reportArgumentType]
    return get_args(annotation)[1] if get_origin(annotation) is dict else None
