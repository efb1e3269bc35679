"""Helpers for what commands print: the recipe keys that a message names, and standard error without warnings."""

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin

from steptron.config.decode import strip_optional
from steptron.config.schema import Recipe

_DOTTED = re.compile(r"(?<![\w./~-])[a-z_]\w*(?:\.\w+)+(?![\w(/])")
_SET = re.compile(r"(?<![\w./~-])([a-z_]\w*(?:\.\w+)*)=")


def unknown_keys(message: str) -> list[str]:
    """Return what reads like a key of the recipe in a message (`a.b.c`, or `a=…`), and is none by its full name."""
    named = [*_DOTTED.findall(message), *_SET.findall(message)]
    return [name for name in named if not name.endswith((".yaml", ".json")) and not _is_key(Recipe, name.split("."))]


def without_warnings(text: str) -> str:
    """Return what a run has printed on standard error, without the warnings about its sources, which rank 0 prints."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("warning: stage "))


def _is_key(annotation: Any, path: list[str]) -> bool:
    annotation, _ = strip_optional(annotation)
    if not path:
        return True
    if is_dataclass(annotation):
        types = {field.name: field.type for field in fields(annotation)}
        return path[0] in types and _is_key(types[path[0]], path[1:])
    if get_origin(annotation) in (dict, Mapping):
        return _is_key(get_args(annotation)[1], path[1:])
    if get_origin(annotation) is tuple:
        return path[0].isdecimal() and _is_key(get_args(annotation)[0], path[1:])
    return False
