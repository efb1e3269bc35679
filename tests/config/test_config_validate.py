"""Ranges cover the schema; each rule lets its border through and stops one beyond."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from steptron.config import schema
from steptron.config.decode import decode, encode, strip_optional
from steptron.config.resolve import resolve
from steptron.config.schema import Recipe
from steptron.config.validate import RANGES, Range, validate
from steptron.errors import RecipeError

from messages import unknown_keys

SECTIONS = [c for c in vars(schema).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]


SMALL = Path(__file__).parent / "small.yaml"


def changed(**changes: Any) -> Recipe:
    """`stages__base__tokens=5` → small.yaml's recipe with stages.base.tokens 5."""
    plain = encode(resolve(str(SMALL)))
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = plain
        for name in sections:
            section = section[name]
        section[last] = value
    return decode(Recipe, plain)


def lr(**settings: Any) -> dict[str, Any]:
    """A first stage of a million tokens with this learning rate."""
    return {"stages__base__lr": {"peak": 1.0, **settings}, "stages__base__tokens": 10**6}


def evaluated(**settings: Any) -> dict[str, Any]:
    """An evaluation on one source."""
    return {"evaluation": {"sources": {"held": {"path": "held"}}, **settings}}


def _is_number(annotation: Any) -> bool:
    annotation, _ = strip_optional(annotation)
    if get_origin(annotation) is dict:
        annotation = get_args(annotation)[1]
    return annotation in (int, float) and get_origin(annotation) is not Annotated


@pytest.mark.parametrize("section", SECTIONS, ids=lambda c: c.__name__)
def test_every_number_of_the_schema_has_a_range(section: type) -> None:
    fields = {field.name: field.type for field in dataclasses.fields(section)}
    numbers = {name for name, annotation in fields.items() if _is_number(annotation)}
    ranged = set(RANGES.get(section, {}))
    # The mesh axes share one table; token counts are checked by the decoder.
    known = {name for name in ranged if name in fields}
    assert numbers <= known, f"without a range: {numbers - known}"
    if section not in (schema.DenseMeshConfig, schema.ExpertMeshConfig):
        assert ranged <= set(fields), f"not in the schema: {ranged - set(fields)}"


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "rule"),
    [
        pytest.param(Range(above=0), [1e-9, 5], [0, -1], "above 0", id="above"),
        pytest.param(Range(at_least=1), [1, 2], [0, -1], "at least 1", id="at-least"),
        pytest.param(Range(at_least=0, below=1), [0, 0.999], [-0.1, 1], "at least 0 and below 1", id="half-open"),
        pytest.param(Range(above=0, at_most=1), [0.1, 1], [0, 1.1], "above 0 and at most 1", id="share"),
        pytest.param(
            Range(at_least=1, or_rest=True),
            [1, -1],
            [0, -2],
            "at least 1, or -1 for what is left of the ranks",
            id="axis",
        ),
    ],
)
def test_ranges(bounds: Range, inside: list[float], outside: list[float], rule: str) -> None:
    assert all(bounds.holds(value) for value in inside)
    assert not any(bounds.holds(value) for value in outside)
    assert bounds.rule() == rule


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"stages__longer__seq_len": 4096}, id="length-of-the-rope-range"),
        pytest.param({"model__moe__top_k": 16}, id="all-experts"),
        pytest.param(
            {"stages__base__tokens": 65536, "stages__base__lr__warmup": 0, "stages__base__lr__decay": 65536},
            id="ramp-to-the-end",
        ),
        pytest.param(lr(warmup=10**6), id="warm-up-to-the-end"),
        pytest.param(lr(kind="wsd", end=0.0, warmup=4, decay=999_996), id="wsd-without-plateau"),
        pytest.param(lr(kind="cosine", end=0.0, warmup=999_999), id="fall-of-one-token"),
        pytest.param({"stages__base__mix": {"prose": 0.0, "code": 2}}, id="one-source-off"),
        pytest.param({"stages__base__limits__routed": {"1": 7.0}}, id="first-moe-layer"),
        pytest.param({"model__full__rotary_share": 0.0625}, id="two-channels"),
        pytest.param({"data__skip": [[1, 1], [7, 9]]}, id="one-step-skipped"),
        pytest.param(
            {"stages__base__min_length": {"code": 9}, "stages__base__max_length": {"code": 9}}, id="one-length"
        ),
        pytest.param(
            {"model__num_dense_layers": 6, **{f"stages__{s}__limits": {} for s in ("base", "longer")}},
            id="all-dense",
        ),
        pytest.param(
            {"parallel__dense__dp_shard": 1, "parallel__expert__ep": -1, "parallel__expert__dp_shard": 1}, id="axes"
        ),
        pytest.param({**evaluated(every=4), "checkpoint__every": 4, "checkpoint__keep_best": True}, id="best"),
    ],
)
def test_borders_are_allowed(changes: dict[str, Any]) -> None:
    validate(changed(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"stages__base__tokens": 65535, "stages__base__lr": {"peak": 1.0}},
            "stages.base.ramp.0.until=65536 is beyond the stage's end",
            id="ramp-past-the-end",
        ),
        pytest.param(
            lr(warmup=10**6 + 1),
            "stages.base.lr.warmup=1000001 does not fit into stages.base.tokens=1000000",
            id="warm-up-past-the-end",
        ),
        pytest.param(
            lr(kind="wsd", end=0.0, warmup=5, decay=999_996),
            "stages.base.lr.warmup=5 and stages.base.lr.decay=999996 do not fit",
            id="wsd-past-the-end",
        ),
        pytest.param(
            lr(kind="linear", end=0.0, warmup=10**6), "stages.base.lr.warmup=1000000 does not fit", id="no-fall-left"
        ),
        pytest.param(
            {"stages__base__mix": {}},
            "stages.base.mix has no source with a weight above 0; known: prose, code",
            id="empty-mix",
        ),
        pytest.param({"data__sources": {}}, "data.sources is empty", id="no-sources"),
        pytest.param({"stages": {}}, "stages is empty", id="no-stages"),
        pytest.param(
            {"checkpoint__keep_best": True},
            "checkpoint.keep_best=true needs an evaluation loss, and evaluation.sources is empty",
            id="best-without-evaluation",
        ),
        pytest.param(
            {**evaluated(every=3), "checkpoint__every": 4, "checkpoint__keep_best": True},
            "evaluation.every=3 does not divide checkpoint.every=4; nearest: 2, 4",
            id="best-between-evaluations",
        ),
        *(
            pytest.param(
                {"data__skip": [pair]}, f"data.skip.0={pair} must be the first and the last step", id=f"skip-{pair}"
            )
            for pair in ([5], [0, 3], [4, 3], [1, 2, 3])
        ),
        pytest.param(
            {"stages__base__mix": {"prose": 1.0, "code": 0.0}, "stages__base__min_length": {"code": 5}},
            "stages.base.min_length.code=5: the stage does not draw from 'code'",
            id="limit-of-no-source",
        ),
        pytest.param(
            {"stages__base__max_length": {"code": 4}, "stages__base__min_length": {"code": 5}},
            "stages.base.min_length.code=5 must be at most stages.base.max_length.code=4",
            id="no-length",
        ),
        pytest.param(
            {"stages__base__max_length": {"code": 0}}, "stages.base.max_length.code=0 must be at least 1", id="length-0"
        ),
        pytest.param({"run__name": "a/b"}, "run.name=a/b must be a plain folder name", id="path-for-name"),
        pytest.param(
            {"model__rope_scaling": {"factor": 2.0, "original_max_positions": 2047}},
            "model.max_positions=4096 is beyond model.rope_scaling.factor × model.rope_scaling.original_max_positions = 4094",
            id="scaling-too-short",
        ),
        pytest.param(
            {"model__rope_scaling": {"factor": 2.0, "original_max_positions": 2048, "low_freq_factor": 32.0}},
            "model.rope_scaling.low_freq_factor=32.0 must be below",
            id="scaling-factors",
        ),
        pytest.param(
            {"model__num_dense_layers": 7},
            "model.num_dense_layers=7 must be at most model.num_layers=6",
            id="dense-layers",
        ),
        pytest.param(
            {"model__num_dense_layers": 6},
            "layer 4 is not a MoE layer; they are none, all layers are dense",
            id="limits-without-moe",
        ),
    ],
)
def test_one_beyond_is_not(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        validate(changed(**changes))
    assert message in str(caught.value)
    assert unknown_keys(str(caught.value)) == []
