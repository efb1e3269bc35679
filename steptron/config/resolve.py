"""The way from a recipe's name and overrides to a `Recipe`, and between a `Recipe` and its `recipe.yaml`.

    name or path ──find──▶ file ──Hydra compose, overrides──▶ plain dict ──decode──▶ Recipe ──validate──▶ Recipe

Overrides follow Hydra's grammar, with one simplification: a key that schema.py knows needs no `+`, whether or not a
YAML file sets it. New members of mappings (stages, sources, a mix) do need it, so that a misspelt stage is an error. A
mapping given whole replaces what was there (compose.py).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

import steptron
from steptron.config.compose import composed, lines_of
from steptron.config.decode import decode, encode, field_types, join, strip_optional, unknown_key
from steptron.config.high_rates import high_rates
from steptron.config.layouts import by_layout
from steptron.config.schema import Recipe
from steptron.config.validate import validate
from steptron.errors import RecipeError, nearest

Tell = Callable[[str], None]
"""A function that shows one line to the person who called the command."""


def silent(line: str) -> None:
    """Show nothing."""


def resolve(
    recipe: str,
    overrides: Sequence[str] = (),
    recipes_dir: Path | None = None,
    stage: str | None = None,
    tell: Tell = silent,
) -> Recipe:
    """Return the decoded and validated recipe. With `stage`, return it with that stage only ("" is the first one).

    `recipe` is a name in `recipes_dir`/pretrain, a name of two parts (`pretrain/demo`), or the path of a YAML file
    anywhere, which may build on the groups and recipes of `recipes_dir`. A file that exists wins over a name if the
    text ends in `.yaml` or has a folder in it. Other stages are not validated when `stage` is given. `tell` gets one
    line if a name also fits a file of the working directory, and one for each stage whose learning rate is far above
    the usual. Raises `RecipeError`.
    """
    root = (recipes_dir or default_recipes_dir()).resolve()
    if not root.is_dir():
        raise RecipeError(f"--recipes {root}: there is no such folder")
    folder, name = _find(recipe, root, tell)
    return _compose(folder, name, root, list(overrides), stage, tell)


def load_recipe(path: Path, overrides: Sequence[str] = (), tell: Tell = silent) -> Recipe:
    """Return the recipe that `to_yaml` wrote to `path`, with overrides. `tell` is as in `resolve`. Raises
    `RecipeError`."""
    path = path.resolve()
    if not path.is_file():
        raise RecipeError(f"{path}: there is no such file; every run folder has one, with the run's recipe")
    return _compose(path.parent, path.name.removesuffix(".yaml"), path.parent, list(overrides), None, tell)


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, with all defaults written out."""
    return OmegaConf.to_yaml(OmegaConf.create(encode(recipe)))


def default_recipes_dir() -> Path:
    """Return `recipes/` beside the package in a checkout, else the copy inside the installed package."""
    package = Path(steptron.__file__).parent
    checkout = package.parent / "recipes"
    return checkout if (checkout / "pretrain").is_dir() else package / "_recipes"


def _find(recipe: str, root: Path, tell: Tell) -> tuple[Path, str]:
    """Return the folder and the name of the recipe's file, relative to the folder and without `.yaml`."""
    path = Path(recipe)
    is_path = path.suffix == ".yaml" or len(path.parts) > 1
    if is_path and path.is_file():
        return _of_file(recipe, root)
    name = recipe.removesuffix(".yaml")
    # `./demo` and `../demo` are of the working directory, and never names in the recipes folder.
    for candidate in (f"pretrain/{name}", name) if name and not name.startswith((".", "/")) else ():
        if (root / f"{candidate}.yaml").is_file():
            beside = Path(f"{name}.yaml")
            if beside.is_file() and not beside.samefile(root / f"{candidate}.yaml"):
                tell(
                    f"{recipe} is the recipe {root / candidate}.yaml, not ./{beside}; "
                    f"write ./{beside} for the file in this folder"
                )
            return root, candidate
    if path.is_file():
        return _of_file(recipe, root)
    if name and Path(f"{name}.yaml").is_file():
        raise RecipeError(f"{recipe}: there is no such file; nearest: {name}.yaml")
    known = sorted(file.stem for file in (root / "pretrain").glob("*.yaml"))
    raise RecipeError(
        f"{recipe}: no file and no recipe of that name in {root / 'pretrain'}; {nearest(Path(name).name, known)}"
    )


def _of_file(recipe: str, root: Path) -> tuple[Path, str]:
    """Return what `_find` returns, for a file that exists."""
    path = Path(recipe).resolve()
    if path.suffix != ".yaml":
        raise RecipeError(f"{recipe}: a recipe is a file whose name ends in .yaml")
    inside = path.is_relative_to(root)
    return (root, str(path.relative_to(root).with_suffix(""))) if inside else (path.parent, path.stem)


def _compose(folder: Path, name: str, root: Path, overrides: list[str], stage: str | None, tell: Tell) -> Recipe:
    parsed = _parse(overrides)
    groups = {path.name for base in (folder, root) for path in base.iterdir() if path.is_dir()}
    search = [] if folder == root else ["hydra.searchpath=['file://{}']".format(re.sub(r"([\\'])", r"\\\1", str(root)))]
    # A first composition without the changes of values tells which stages, sources and other members they may name.
    changes = [o for o in parsed if _changes_value(o, groups)]
    plain = values = _hydra(folder, name, search + [line for o in parsed if o not in changes for line in _lines(o, {})])
    for change in changes:
        _check_key(change.key_or_group, values)
    if changes:
        lines = [line for o in parsed for line in _lines(o, values, o in changes)]
        values = _hydra(folder, name, search + lines)
    recipe = decode(Recipe, values)
    if stage is not None:
        recipe = _alone(recipe, stage)
    validate(recipe)
    for line in high_rates(recipe, plain):
        tell(line)
    return recipe


def _alone(recipe: Recipe, stage: str) -> Recipe:
    """Return the recipe with one stage, in the layout of that stage."""
    name = stage or next(iter(recipe.stages), "")
    if stage and name not in recipe.stages:
        raise RecipeError(f"--stage {name}: the recipe has no such stage; known: {', '.join(recipe.stages)}")
    return by_layout(replace(recipe, stages={name: recipe.stages[name]}))[0] if recipe.stages else recipe


def _parse(overrides: list[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = _first_line(str(error).replace(f"Error parsing override '{text}'", ""))
            raise RecipeError(
                f"{text}: not an override ({reason}); write key=value, +key=value, ~key, or group=name"
            ) from error
        if override.is_sweep_override():
            raise RecipeError(
                f"{text}: a run takes one value for each key; write a list as [a,b], and text with commas as 'a,b'"
            )
        if override.key_or_group.partition(".")[0] == "hydra":
            raise RecipeError(
                f"{text}: Hydra's own settings are not part of a recipe; the run folder is set with run.dir=…"
            )
        parsed.append(override)
    return parsed


def _changes_value(override: Override, groups: set[str]) -> bool:
    """Return whether the override is `key=value` or `~key`. `model=mini` and `~optim` name a group instead, `model={…}`
    does not."""
    if override.type is OverrideType.ADD:
        return False
    if override.type is OverrideType.FORCE_ADD:  # it may name new members, except as one mapping for a whole group
        return override.key_or_group in groups and isinstance(override.value(), Mapping)
    if override.package is not None or "/" in override.key_or_group:
        return False
    if override.type is OverrideType.DEL:
        return override.key_or_group not in groups
    value = override.value()
    return not (override.key_or_group in groups and isinstance(value, str | list))


def _lines(override: Override, values: Mapping[str, Any], is_change: bool = False) -> list[str]:
    """Return what Hydra gets for an override. `values`: the recipe without changes of values."""
    assert override.input_line is not None, "an override that was parsed keeps its text"
    sets = override.type is OverrideType.FORCE_ADD or (is_change and override.type is OverrideType.CHANGE)
    return lines_of(override, values) if sets else [override.input_line]


def _hydra(folder: Path, name: str, overrides: list[str]) -> dict[str, Any]:
    """Compose to nested dicts and lists, interpolations resolved, translating what Hydra, OmegaConf and YAML raise."""
    try:
        return composed(folder, name, overrides)
    except MissingConfigException as error:
        raise _missing_config(error) from error
    except InterpolationKeyError as error:
        raise RecipeError(
            f"{error.full_key}: {_first_line(str(error))}; interpolations name a full key, ${{model.hidden_size}}"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise RecipeError(_clear(name, _first_line(str(error)))) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{mark.name}, line {mark.line + 1}" if mark else name
        raise RecipeError(f"{where}: {error.problem}; the file is not valid YAML") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{name}: cannot be read: {error}") from error


def _clear(name: str, message: str) -> str:
    """Return Hydra's message in words for a reader who does not know Hydra."""
    present = re.fullmatch(r"Could not append to config\. An item is already at '(.*)'\.", message)
    if present:
        return f"{present[1]}: the recipe has it already; leave out the + to change it"
    absent = re.fullmatch(r"Could not delete from config\. '(.*)' does not exist\.", message)
    if absent:
        return f"~{absent[1]}: the recipe does not have it, so it cannot be removed; leave this override out"
    group = re.fullmatch(r"Could not override '(.*)'\. No match in the defaults list\.", message)
    if group:
        return f"{group[1]}: this recipe uses nothing from the group {group[1]} yet; to add it, write +{group[1]}=NAME"
    return f"{name}: {message or 'cannot be composed; is there an unfinished ${…} in it?'}"


def _missing_config(error: MissingConfigException) -> RecipeError:
    missing = str(error.missing_cfg_file or "")
    group, _, option = missing.rpartition("/")
    options = sorted(error.options or ())
    if group and options:
        return RecipeError(f"{group}={option}: group {group} has no option '{option}'; {nearest(option, options)}")
    if group:
        return RecipeError(f"{missing}: there is no such group or file in the recipes folder")
    return RecipeError(_first_line(str(error)))


def _check_key(key: str, composed: Mapping[str, Any]) -> None:
    """Raise the error for a key that is not in the schema, or that names a missing stage, source or other member."""
    annotation: Any = Recipe
    node: Any = composed
    path = ""
    parts = re.split(r"[.\[]", key.replace("]", ""))
    for i, part in enumerate(parts):
        annotation, _ = strip_optional(annotation)
        origin = get_origin(annotation)
        members = node if isinstance(node, Mapping) else {}
        if is_dataclass(annotation):
            known = field_types(annotation)  # pyright: ignore[reportArgumentType]
            if part not in known:
                raise unknown_key(path, part, known, ".".join(parts[i + 1 :]))
            annotation, node = known[part], members.get(part)
        elif origin is dict:
            names = {str(name): item for name, item in members.items()}
            if part not in names:
                raise RecipeError(
                    f"{join(path, part)}: {path} has no '{part}'; {nearest(part, names)}; a new one is added with +"
                )
            annotation, node = get_args(annotation)[1], names[part]
        elif origin is tuple:
            items = node if isinstance(node, list) else []
            if not part.isdecimal() or int(part) >= len(items):
                raise RecipeError(
                    f"{join(path, part)}: {path} is a list of {len(items)}; '{part}' is not the index of an item"
                )
            annotation, node = get_args(annotation)[0], items[int(part)]
        else:
            raise RecipeError(f"{key}: {path} is a value, it has no key '{part}'")
        path = join(path, part)


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
