"""Strict decoding: what is accepted, and the line that says why something is not."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

import pytest
from steptron.config.decode import MEANT, decode, encode, field_types, join, parse_tokens, strip_optional
from steptron.config.schema import Recipe, Tokens
from steptron.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str = "x"
    on: bool = False
    kind: Literal["slow", "fast", "off"] = "slow"
    budget: Tokens = 0
    window: int | None = None
    room: Literal["exact"] | float = "exact"
    inner: Inner
    maybe: Inner | None = None
    steps: tuple[Inner, ...] = ()
    by_name: dict[str, Inner] = field(default_factory=dict)
    by_layer: dict[int, float] = field(default_factory=dict)


FULL = {
    "name": "run",
    "on": True,
    "kind": "fast",
    "budget": "1.5M",
    "window": 4,
    "room": 2,
    "inner": {"width": 3, "rate": 1},
    "maybe": {"width": 1},
    "steps": [{"width": 1}, {"width": 2}],
    "by_name": {"b": {"width": 5}, "a": {"width": 6}},
    "by_layer": {"43": 7.0, 44: 16},
}


def test_decodes_every_kind_of_field() -> None:
    assert decode(Outer, FULL) == Outer(
        name="run",
        on=True,
        kind="fast",
        budget=1_500_000,
        window=4,
        room=2.0,
        inner=Inner(width=3, rate=1.0),
        maybe=Inner(width=1),
        steps=(Inner(width=1), Inner(width=2)),
        by_name={"b": Inner(width=5), "a": Inner(width=6)},
        by_layer={43: 7.0, 44: 16.0},
    )


def test_integers_become_floats_and_mappings_keep_their_order() -> None:
    outer = decode(Outer, FULL)
    assert type(outer.inner.rate) is float
    assert list(outer.by_name) == ["b", "a"]


def test_defaults_and_null() -> None:
    assert decode(Outer, {"inner": {"width": 3}, "window": None, "maybe": None}) == Outer(inner=Inner(width=3))


def test_encode_is_the_inverse() -> None:
    outer = decode(Outer, FULL)
    plain = encode(outer)
    assert decode(Outer, plain) == outer
    assert plain["by_layer"] == {"43": 7.0, "44": 16.0}
    assert plain["steps"] == [{"width": 1, "rate": 0.5}, {"width": 2, "rate": 0.5}]
    assert set(plain) == {f.name for f in dataclasses.fields(Outer)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"inner": {"width": 3, "wdith": 4}},
            "inner.wdith: section inner has no key 'wdith'; nearest: width",
            id="misspelt",
        ),
        pytest.param({"nmae": "y"}, "nmae: a recipe has no key 'nmae'; nearest: name", id="misspelt-on-top"),
        pytest.param(
            {"by_name": {"a": {"width": 1, "zzz": 2}}},
            "by_name.a.zzz: section by_name.a has no key 'zzz'; known: width, rate",
            id="nothing-near",
        ),
        pytest.param({"inner": {}}, "inner.width is not set, and …", id="absent"),
        pytest.param({"inner": {"width": "???"}}, "inner.width is not set, and …", id="marked-missing"),
        pytest.param({"inner": 3}, "inner=3 must be a section with the keys width, rate", id="no-section"),
        pytest.param({"inner": None}, "inner=null must be a section with the keys width, rate", id="null-section"),
        pytest.param({"inner": {"width": 3.0}}, "inner.width=3.0 must be an integer", id="float-for-int"),
        pytest.param({"inner": {"width": True}}, "inner.width=true must be an integer", id="bool-for-int"),
        pytest.param({"inner": {"width": "3"}}, "inner.width=3 must be an integer", id="text-for-int"),
        pytest.param({"inner": {"width": None}}, "inner.width=null must be an integer", id="null-for-int"),
        pytest.param(
            {"inner": {"width": 3, "rate": "high"}}, "inner.rate=high must be a finite number", id="text-for-float"
        ),
        pytest.param({"inner": {"width": 3, "rate": float("nan")}}, "inner.rate=nan must be a finite number", id="nan"),
        pytest.param(
            {"inner": {"width": 3, "rate": float("inf")}}, "inner.rate=inf must be a finite number", id="infinite"
        ),
        pytest.param({"on": 1}, "on=1 must be true or false", id="int-for-bool"),
        pytest.param({"name": 7}, "name=7 must be text; put it in quotes", id="int-for-text"),
        pytest.param({"kind": "fats"}, "kind=fats must be one of slow, fast, off; nearest: fast", id="choice"),
        pytest.param({"kind": False}, "kind=false must be one of slow, fast, off; put it in quotes", id="yaml-off"),
        pytest.param(
            {"kind": ["slow"]}, "kind=['slow'] must be one of slow, fast, off; nearest: slow", id="list-for-choice"
        ),
        pytest.param({"room": "exat"}, "room=exat must be exact or a finite number", id="word-or-number"),
        pytest.param({"room": None}, "room=null must be exact or a finite number", id="null-for-word-or-number"),
        pytest.param({"budget": "1.5G"}, "budget=1.5G must be a whole number of tokens, …", id="suffix"),
        pytest.param({"budget": -1}, "budget=-1 must be a whole number of tokens, …", id="negative-tokens"),
        pytest.param({"budget": False}, "budget=false must be a whole number of tokens, …", id="bool-tokens"),
        pytest.param({"steps": {"width": 1}}, "steps={'width': 1} must be a list", id="mapping-for-list"),
        pytest.param(
            {"steps": [{"width": 1}, {"width": "a"}]}, "steps.1.width=a must be an integer", id="inside-a-list"
        ),
        pytest.param({"by_name": [1]}, "by_name=[1] must be a mapping, name: value", id="list-for-mapping"),
        pytest.param(
            {"by_name": {1: {"width": 1}}}, "by_name.1: the key 1 must be text; put it in quotes", id="number-for-name"
        ),
        pytest.param({"by_layer": {"x": 1.0}}, "by_layer.x: the key 'x' must be an integer", id="text-for-layer"),
        pytest.param(
            {"by_layer": {"4": 1.0, 4: 2.0}},
            "by_layer.4 is given twice, as a number and as text; leave one of them out",
            id="twice",
        ),
    ],
)
def test_what_is_wrong_is_named(change: dict, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        decode(Outer, {"inner": {"width": 3}, **change})
    start, cut, _ = message.partition("…")
    assert str(caught.value).startswith(start) if cut else str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1_000", 1000),
        ("4K", 4_000),
        ("4k", 4_000),
        ("1.5M", 1_500_000),
        ("11.58B", 11_580_000_000),
        ("14.6T", 14_600_000_000_000),  # 14.6 · 10¹² is not exact in floats
        ("1e9", 10**9),
        ("65536.0", 65536),
        ("1.0001K", None),
        ("0.5", None),
        ("-4K", None),
        ("K", None),
        ("", None),
        ("nan", None),
        ("infT", None),
        ("4KK", None),
    ],
)
def test_token_counts(text: str, tokens: int | None) -> None:
    assert parse_tokens(text) == tokens


def choices(section: type = Recipe, path: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every choice of the schema: its key, and the words that it knows."""
    for name, annotation in field_types(section).items():
        inner, key = strip_optional(annotation)[0], join(path, name)
        while get_origin(inner) in (tuple, dict):
            inner = get_args(inner)[-1 if get_origin(inner) is dict else 0]
        if dataclasses.is_dataclass(inner):
            yield from choices(inner, key)  # pyright: ignore[reportArgumentType]
        elif get_origin(inner) is Literal:
            yield key, get_args(inner)


def choose(key: str, words: tuple[Any, ...], value: object) -> None:
    """Decode a section that has nothing but this choice."""
    path, _, name = key.rpartition(".")
    decode(dataclasses.make_dataclass("Section", [(name, Literal[words])]), {name: value}, path)  # pyright: ignore


@pytest.mark.parametrize("word", MEANT)
def test_a_word_of_other_tools_leads_to_what_is_meant(word: str) -> None:
    known = {key: words for key, words in choices() if set(words) & set(MEANT[word])}
    assert known, "some field knows it"
    for key, words in known.items():
        if word in words:
            continue
        with pytest.raises(RecipeError) as caught:
            choose(key, words, word)
        meant = next(choice for choice in MEANT[word] if choice in words)
        assert str(caught.value) == f"{key}={word} must be one of {', '.join(words)}; nearest: {meant}"


def test_a_bare_off_is_put_in_quotes_only_where_off_is_a_choice() -> None:
    for value, key, hint in (
        (False, "monitor.level", "put it in quotes"),
        (False, "monitor.wandb.mode", "nearest: disabled"),
        (True, "monitor.wandb.mode", "nearest: online"),
    ):
        with pytest.raises(RecipeError) as caught:
            choose(key, dict(choices())[key], value)
        assert str(caught.value).endswith(f"; {hint}")
