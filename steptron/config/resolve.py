"""The way from a recipe's name and overrides to a `Recipe`, and between a `Recipe` and its `recipe.yaml`.

    name or path ──find──▶ file ──compose.py──▶ merged files ──overrides.py──▶ plain dict ──decode, validate──▶ Recipe

Overrides follow Hydra's grammar, with one simplification: a key that schema.py knows needs no `+`, whether or not a
YAML file sets it. New members of mappings (stages, sources, a mix) do need it, so that a misspelt stage is an error. A
mapping given whole replaces what was there (compose.py).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationKeyError, OmegaConfBaseException

import steptron
from steptron.config.compose import composed
from steptron.config.decode import decode, encode
from steptron.config.high_rates import high_rates
from steptron.config.layouts import by_layout
from steptron.config.overrides import first_line, make, parse, refuse_sweeps
from steptron.config.schema import Recipe
from steptron.config.validate import validate, validate_new
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
    """Return the decoded and validated recipe of a new run.

    With `stage`, return it with that stage only ("" is the first one).

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
    found = _compose(folder, name, root, list(overrides), stage, tell)
    validate_new(found)
    return found


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
    refuse_sweeps(parse(overrides))
    with _translated(name):
        config, changes = composed([folder] if folder == root else [folder, root], name, overrides)
        plain: Any = OmegaConf.to_container(config, resolve=False)
        for change in changes:
            make(config, change, plain)
        values = OmegaConf.to_container(config, resolve=True)
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


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise into `RecipeError`."""
    try:
        yield
    except MissingConfigException as error:
        raise _missing_config(error) from error
    except InterpolationKeyError as error:
        raise RecipeError(
            f"{error.full_key}: {first_line(str(error))}; interpolations name a full key, ${{model.hidden_size}}"
        ) from error
    except GrammarParseError as error:
        raise RecipeError(_clear(name, "")) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise RecipeError(_clear(name, first_line(str(error)))) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{mark.name}, line {mark.line + 1}" if mark else name
        raise RecipeError(f"{where}: {error.problem}; the file is not valid YAML") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{name}: cannot be read: {error}") from error
    except ValueError as error:  # Hydra's, about the list of files
        raise RecipeError(f"{name}: {first_line(str(error))}") from error


def _clear(name: str, message: str) -> str:
    """Return Hydra's message in words for a reader who does not know Hydra."""
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
    return RecipeError(first_line(str(error)))
