"""The units of the network in their order, and parts of the network: runs of consecutive units.

    embedding ─ attention 0 ─ ffn 0 ─ … ─ attention L−1 ─ ffn L−1 ─ output 0 ─ block 1 … block M ─ output 1 … output M

A layer is two units, attention and FFN, each with its norm and its residual sum. Output 0 is the final norm and the
output matrix. MTP head h, from 1 to M, has two units: its block, and its norm with its output matrix. Blocks are
chained. An output needs only the state of its own block, so all outputs follow the last block: a pipeline stage can
have the blocks of some heads and the output matrices of others, and the work can be spread more evenly.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from steptron.config.schema import ModelConfig


class Unit(NamedTuple):
    """A piece of the network that is never cut."""

    kind: Literal["embedding", "attention", "ffn", "block", "output"]
    number: int
    """The layer, or the head: 0 is the prediction of the next token, and MTP heads follow."""


def units_of(model: ModelConfig) -> tuple[Unit, ...]:
    """Return the units of the network in their order."""
    heads = range(1, 1 + model.num_mtp_heads)
    return (
        Unit("embedding", 0),
        *(Unit(half, n) for n in range(model.num_layers) for half in ("attention", "ffn")),
        Unit("output", 0),
        *(Unit("block", h) for h in heads),
        *(Unit("output", h) for h in heads),
    )


def following(model: ModelConfig, unit: Unit) -> Unit | None:
    """Return the unit behind this one, or None behind the last."""
    units = units_of(model)
    place = units.index(unit) + 1
    return units[place] if place < len(units) else None


@dataclass(frozen=True)
class Part:
    """A run of consecutive units: a pipeline stage, or the complete network."""

    units: tuple[Unit, ...]
    then: Unit | None = None
    """The unit that follows in the next part; None in the last part."""

    @property
    def first(self) -> bool:
        """Return whether the part has the embedding of the input tokens."""
        return self.units[0].kind == "embedding"

    @property
    def last(self) -> bool:
        """Return whether no part follows."""
        return self.then is None

    @cached_property
    def attentions(self) -> tuple[int, ...]:
        """Return the backbone layers whose attention is in the part."""
        return self._numbers("attention")

    @cached_property
    def ffns(self) -> tuple[int, ...]:
        """Return the backbone layers whose FFN is in the part."""
        return self._numbers("ffn")

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Return the MTP heads, counted from 1, whose blocks are in the part."""
        return self._numbers("block")

    @cached_property
    def outputs(self) -> tuple[int, ...]:
        """Return the heads whose output matrices are in the part. They are consecutive numbers."""
        return self._numbers("output")

    def received(self, trained: int) -> tuple[int, ...]:
        """Return the heads whose states come from the part before; see `states_before`."""
        return states_before(self.units[0], trained)

    def sent(self, trained: int) -> tuple[int, ...]:
        """Return the heads whose states the next part receives; see `states_before`."""
        return () if self.then is None else states_before(self.then, trained)

    def _numbers(self, kind: str) -> tuple[int, ...]:
        return tuple(unit.number for unit in self.units if unit.kind == kind)


def whole(model: ModelConfig) -> Part:
    """Return the complete network as one part."""
    return Part(units_of(model))


def parts_of(model: ModelConfig, lengths: tuple[int, ...]) -> list[Part]:
    """Return parts with these numbers of units, in order. Together they are the complete network."""
    units, parts, start = units_of(model), [], 0
    for length in lengths:
        stop = start + length
        parts.append(Part(units[start:stop], units[stop] if stop < len(units) else None))
        start = stop
    assert start == len(units), f"{lengths} are {start} units of {len(units)}"
    return parts


def states_before(unit: Unit, trained: int) -> tuple[int, ...]:
    """Return the heads whose states (before their norm) this unit or a later one reads. 0 is the backbone.

    `trained` is the number of MTP heads that run.
    """
    kind, number = unit
    if kind == "embedding":
        return ()
    if kind in ("attention", "ffn") or unit == ("output", 0):
        return (0,)
    if kind == "output":
        return tuple(range(number, trained + 1))
    if number == 1:
        return (0,) if trained else ()
    return tuple(range(1, min(number - 1, trained) + 1))
