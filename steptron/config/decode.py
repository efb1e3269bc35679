"""Strict decoding of plain values (the content of YAML) into the frozen dataclasses of schema.py, and back.

    decode(Recipe, {"seed": 1, …})  →  Recipe        every key must exist, every value must have the field's type
    encode(recipe)                  →  {"seed": 1, …}  all fields, defaults included; keys of mappings are strings

Nothing is converted, with three exceptions: an integer is accepted as a float, a whole float or a suffixed text
(`1.5M`) as `Tokens`, and the text `43` as an integer key of a mapping.
"""

import dataclasses
import math
import types
from collections.abc import Collection, Mapping
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from steptron.config.habits import meant
from steptron.errors import RecipeError, nearest

T = TypeVar("T")

TOKEN_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
MISSING = "???"
"""The value that OmegaConf writes for a key that must still be set."""

UNIONS = (types.UnionType, Union)

MEANT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpu", "nvidia", "rocm"), ("cuda",)),
    **dict.fromkeys(("float32", "float", "single", "32"), ("fp32",)),
    **dict.fromkeys(("bfloat16", "bfloat", "half", "mixed", "16"), ("bf16",)),
    **dict.fromkeys(("flat", "fixed"), ("constant",)),
    **dict.fromkeys(("trapezoid", "warmup_stable_decay"), ("wsd",)),
    "gpipe": ("1f1b",),
    "virtual": ("interleaved",),
    "zero_bubble": ("zb-v",),
    **dict.fromkeys(("mlp", "moe", "experts", "feed_forward"), ("ffn",)),
    **dict.fromkeys(("swiglu", "activation"), ("silu",)),
    **dict.fromkeys(("a2a", "deepep"), ("all_to_all",)),
    **dict.fromkeys(("torch", "pytorch", "fsdp", "fsdp2"), ("native",)),
    "zero": ("deepspeed",),
    "te": ("transformer_engine",),
    **dict.fromkeys(("no", "none", "null", "false", "off"), ("off", "disabled")),
    **dict.fromkeys(("all", "verbose", "debug"), ("full",)),
    **dict.fromkeys(("yes", "true", "on"), ("on", "online")),
}
"""The names that other tools use for a choice, each with the choices it may stand for. The first one that the field has
is suggested."""


def decode(cls: type[T], data: object, path: str = "") -> T:
    """Return an instance of the dataclass `cls` built from nested plain values.

    `path` is the key of `data` in the recipe, for messages. Raises `RecipeError` with the full key, the value and the
    expected type.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{_shown(path, data)} must be a section with the keys {', '.join(field_types(cls))}")
    annotations = field_types(cls)
    for key in data:
        if key not in annotations:
            raise unknown_key(path, str(key), annotations)
    values = {}
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        key = join(path, field.name)
        if field.name in data and data[field.name] != MISSING:
            values[field.name] = _decode_value(annotations[field.name], data[field.name], key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecipeError(
                f"{key} is not set, and it has no default; give it in the recipe or as {key}=…{_whole(key)}"
            )
    return cls(**values)


def _whole(key: str) -> str:
    """Return the end of a message for a stage that a file with defaults gives in part."""
    more = "; `stages` in a file replaces all stages of its defaults, so each one must be complete"
    return more if key.startswith("stages.") else ""


def encode(value: object) -> Any:
    """Return the inverse of `decode`: dicts, lists and scalars that YAML and JSON can hold, with all defaults written
    out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def field_types(cls: type) -> dict[str, Any]:
    """Return the annotations of a dataclass by field name."""
    return {field.name: field.type for field in dataclasses.fields(cls)}


def strip_optional(annotation: Any) -> tuple[Any, bool]:
    """Return (X, True) for `X | None`, and (annotation, False) for any other annotation."""
    if get_origin(annotation) in UNIONS and types.NoneType in get_args(annotation):
        (inner,) = (member for member in get_args(annotation) if member is not types.NoneType)
        return inner, True
    return annotation, False


def word_or_number(annotation: Any) -> tuple[tuple[str, ...], type] | None:
    """Return (("auto",), int) for `Literal["auto"] | int`, and None for an annotation that is no union."""
    if get_origin(annotation) not in UNIONS:
        return None
    words, number = get_args(annotation)
    return get_args(words), number


def join(path: str, key: object) -> str:
    """Join two parts of a key: `model`, `moe` → `model.moe`."""
    return f"{path}.{key}" if path else str(key)


RENAMED = {
    "start": "init_from",
    "copy_to": "mirror_to",
    "matrices": "matrix_optimizer",
    "acts": "actions",
    "context": "cp_method",
    "dispatch": "ep_dispatch",
    "steps": "raise_after_steps",
    "clear": "clear_ratio",
    "new_normal": "rebase_after_steps",
    "up": "threshold_up",
    "down": "threshold_down",
}
"""New names of keys that recipes had before."""


def _choice(value: object, known: Collection[str]) -> str:
    """Return the end of a message: the choice that `value`, which is not in `known`, probably means."""
    name = str(value).lower()
    if isinstance(value, bool):  # YAML reads a bare on or off so
        written = ("on", "true", "yes") if value else ("off", "false", "no")
        if any(word in known for word in written):
            return "put it in quotes"
    meant = next((word for word in MEANT.get(name.replace("-", "_"), ()) if word in known), None)
    return f"nearest: {meant}" if meant else nearest(name, known)


def unknown_key(path: str, key: str, known: Collection[str], rest: str = "") -> RecipeError:
    """Return the error for `key`, which is not among the keys `known` of the section at `path`.

    `rest`: the parts that follow `key` in an override, such as `lr` of `optimizer.lr`.
    """
    where = f"section {path}" if path else "a recipe"
    new = RENAMED.get(key)
    if new in known:
        hint = f"it is called {new} now"
    else:
        habit, near = meant(path, join(key, rest) if rest else key, known), nearest(key, known)
        inside = rest and habit.startswith(f"{near.removeprefix('nearest: ')}.")  # only the section is misspelt
        hint = f"meant: {habit}" if habit and not inside else near
    return RecipeError(f"{join(path, key)}: {where} has no key '{key}'; {hint}")


def parse_tokens(text: str) -> int | None:
    """Return the number of tokens of a text: `14.6T` → 14600000000000. None if it is not a whole, non-negative
    number."""
    factor = TOKEN_SUFFIXES.get(text[-1:].upper(), 1)
    digits = text[:-1] if factor > 1 else text
    try:
        count = Decimal(digits.replace("_", "")) * factor
        return int(count) if count >= 0 and count == count.to_integral_value() else None
    except (InvalidOperation, OverflowError):  # no number, NaN, infinity
        return None


def _decode_value(annotation: Any, value: object, path: str) -> Any:
    annotation, optional = strip_optional(annotation)
    if value is None and optional:
        return None
    if dataclasses.is_dataclass(annotation):
        return decode(annotation, value, path)  # pyright: ignore[reportArgumentType]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind, mark = arguments
        return _decode_tokens(value, path) if mark == "tokens" else _decode_scalar(kind, value, path)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            known = [str(argument) for argument in arguments]
            raise RecipeError(f"{_shown(path, value)} must be one of {', '.join(known)}; {_choice(value, known)}")
        return value
    if (either := word_or_number(annotation)) is not None:
        words, number = either
        return value if value in words else _decode_scalar(number, value, path, f"{' or '.join(words)} or ")
    if origin is dict:
        return _decode_mapping(arguments, value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{_shown(path, value)} must be a list")
        return tuple(_decode_value(arguments[0], item, join(path, i)) for i, item in enumerate(value))
    return _decode_scalar(annotation, value, path)


def _decode_mapping(arguments: tuple[Any, ...], value: object, path: str) -> dict[Any, Any]:
    key_type, item_type = arguments
    if not isinstance(value, Mapping):
        raise RecipeError(f"{_shown(path, value)} must be a mapping, name: value")
    decoded = {}
    for key, item in value.items():
        name = key
        if key_type is int:
            if isinstance(key, bool) or not str(key).isdecimal():
                raise RecipeError(f"{join(path, key)}: the key '{key}' must be an integer")
            name = int(key)
        elif not isinstance(key, str):
            raise RecipeError(f"{join(path, key)}: the key {key!r} must be text; put it in quotes")
        if name in decoded:
            raise RecipeError(f"{join(path, name)} is given twice, as a number and as text; leave one of them out")
        decoded[name] = _decode_value(item_type, item, join(path, key))
    return decoded


def _decode_tokens(value: object, path: str) -> int:
    count = parse_tokens(str(value)) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
    if count is None:
        raise RecipeError(
            f"{_shown(path, value)} must be a whole number of tokens, such as 250000, 250K, 1.5M, 20B, 14.6T"
        )
    return count


def _decode_scalar(annotation: type, value: object, path: str, words: str = "") -> Any:
    """Return a value of this type. `words`: what else the key may be, for the message."""
    if annotation is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if annotation is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if annotation in (bool, str) and isinstance(value, annotation):
        return value
    kind = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}[annotation]
    hint = "; put it in quotes" if annotation is str and isinstance(value, int | float) else ""
    raise RecipeError(f"{_shown(path, value)} must be {words}{kind}{hint}")


def _shown(path: str, value: object) -> str:
    """Return `key=value` as a person would type it, with long values shortened."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    else:
        text = str(value) if isinstance(value, str | int | float) else str(encode(value))
    text = text if len(text) <= 60 else text[:57] + "…"
    return f"{path or 'the recipe'}={text}"
