"""Compare the records of many ranks with those of one process: each number's error and bound, the first that fails.

    records of one process ┐
                           ├─ compare ─► findings, in the order in  ─┬─ first_offending
    records of each rank   ┘              which a fault would show   └─ summarise: the worst of each kind

A parameter's pieces are joined by the rectangles that the ranks hold. Every element must be held, and pieces may
overlap only if they are copies. Of copies the worst one counts.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import inf, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from steptron.nn.shard_geometry import Rectangle
from steptron.prove.trial import Record


class Kind(NamedTuple):
    """A kind of quantity."""

    title: str
    bound: float
    """The largest allowed relative error. 0 means equal."""


HELD = Kind("parameters held", 0.0)
OUTPUTS = Kind("layer outputs", 1e-5)
LOSS, MTP_LOSS = Kind("loss", 1e-5), Kind("mtp loss", 1e-5)
BALANCE_LOSS, TOTAL_LOSS = Kind("balance loss", 1e-5), Kind("total loss", 1e-5)
COUNTS = Kind("expert counts", 0.0)
GRADIENTS = Kind("gradients", 1e-5)
NORM = Kind("gradient norm", 1e-5)
PARAMETERS = Kind("parameters", 1e-5)
BIASES = Kind("router biases", 0.0)

NEAR_TIE = 5e-6
"""The difference of two experts' scores below which another rounding may swap them."""

KINDS = (
    HELD,
    OUTPUTS,
    LOSS,
    MTP_LOSS,
    BALANCE_LOSS,
    TOTAL_LOSS,
    COUNTS,
    GRADIENTS,
    NORM,
    PARAMETERS,
    BIASES,
)
"""The kinds of quantities, in the order in which a fault shows inside a step: the first wrong one is nearest to the
fault."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of one number or tensor of one step."""

    kind: Kind
    name: str
    """The parameter, module or layer. Empty if the kind has only one."""
    step: int
    """The step. 0 is before the first step."""
    rank: int | None
    """The worst rank. None if it belongs to no rank in particular."""
    error: float
    """The relative error. It is infinite if a part is missing or should not exist."""
    remark: str = ""

    @property
    def holds(self) -> bool:
        """Return whether the error is within the kind's bound. NaN is not."""
        return self.error <= self.kind.bound

    @property
    def where(self) -> str:
        """Return name, step and rank, as far as they exist."""
        parts = [self.name, f"step {self.step}" if self.step else "", "" if self.rank is None else f"rank {self.rank}"]
        return ", ".join(part for part in [*parts, self.remark] if part)


@dataclass(frozen=True, kw_only=True)
class RankRun:
    """The results of one rank under one layout."""

    rectangles: dict[str, Rectangle]
    """This rank's part of each parameter that it holds."""
    records: list[Record]
    registry: dict = field(default_factory=dict)
    """The meaning of the statistics in its records (`Registry.to_dict`)."""


def compare(reference: RankRun, ranks: list[RankRun], first_moe_layer: int) -> list[Comparison]:
    """Return every finding, in order. `reference`: one process that holds everything, with at least the ranks'
    steps."""
    shapes = {name: rectangle.size for name, rectangle in reference.rectangles.items()}
    findings = list(_held(shapes, ranks))
    by_step = {record.step: record for record in reference.records}
    for index, record in enumerate(ranks[0].records):
        records = [run.records[index] for run in ranks]
        findings += _compare_step(by_step[record.step], records, [run.rectangles for run in ranks], first_moe_layer)
    return findings


def first_offending(findings: Iterable[Comparison]) -> Comparison | None:
    """Return the first finding that does not hold."""
    return next((finding for finding in findings if not finding.holds), None)


def undecided(findings: list[Comparison]) -> bool:
    """Return whether the first finding that does not hold may come from a token at a tie between two experts.

    It then belongs to a MoE layer whose counts differ.
    """
    first = first_offending(findings)
    ties = (f for f in findings if f.kind is COUNTS and f.remark and not f.holds)
    return first is not None and any((f.name, f.step) == (first.name, first.step) for f in ties)


def summarise(findings: Iterable[Comparison]) -> list[Comparison]:
    """Return the worst finding of each existing kind, in order of the kinds."""
    worst: dict[Kind, Comparison] = {}
    for finding in findings:
        before = worst.get(finding.kind)
        if before is None or not _as_number(finding.error) <= _as_number(before.error):
            worst[finding.kind] = finding
    return [worst[kind] for kind in KINDS if kind in worst]


def _as_number(error: float) -> float:
    return error if error == error else inf


def _held(shapes: dict[str, tuple[int, ...]], ranks: list[RankRun]) -> Iterator[Comparison]:
    """Check that each element of each parameter is held, and that pieces overlap only as copies."""
    for name in sorted({name for run in ranks for name in run.rectangles} - shapes.keys()):
        yield Comparison(kind=HELD, name=name, step=0, rank=None, error=inf, remark="not a parameter of one process")
    for name, shape in shapes.items():
        pieces = {run.rectangles[name] for run in ranks if name in run.rectangles}
        times = torch.zeros(shape, dtype=torch.int32)
        for piece in pieces:
            times[piece.slices] += 1
        missing, overlapping = int((times == 0).sum()), int((times > 1).sum())
        remark = "not held by any rank" if missing == times.numel() else f"{missing} elements not held by any rank"
        remark = remark if missing else f"{overlapping} elements in pieces that overlap" if overlapping else ""
        yield Comparison(kind=HELD, name=name, step=0, rank=None, error=inf if remark else 0.0, remark=remark)


def _compare_step(
    whole: Record, records: list[Record], held: list[dict[str, Rectangle]], first_moe_layer: int
) -> Iterator[Comparison]:
    for name, size in whole.outputs.items():
        total = sum(record.outputs.get(name, 0.0) for record in records)
        yield Comparison(kind=OUTPUTS, name=name, step=whole.step, rank=None, error=_relative(total, size))
    terms = {"loss": LOSS, "mtp_loss": MTP_LOSS, "balance_loss": BALANCE_LOSS, "total_loss": TOTAL_LOSS}
    for name, kind in terms.items():
        yield _number(kind, whole, records, lambda record, name=name: record.result.terms[name])
    yield from _counts(whole, records, first_moe_layer)
    yield from _pieces(GRADIENTS, whole.step, whole.gradients, [record.gradients for record in records], held)
    yield _number(NORM, whole, records, lambda record: record.result.grad_norm)
    yield from _pieces(PARAMETERS, whole.step, whole.parameters, [record.parameters for record in records], held)
    for name, bias in whole.biases.items():
        errors = {n: _distance(record.biases[name], bias) for n, record in enumerate(records) if name in record.biases}
        yield _worst(BIASES, name, whole.step, errors)


def _number(kind: Kind, whole: Record, records: list[Record], read: Callable[[Record], float]) -> Comparison:
    errors = {rank: _relative(read(record), read(whole)) for rank, record in enumerate(records)}
    return _worst(kind, "", whole.step, errors)


def _counts(whole: Record, records: list[Record], first_moe_layer: int) -> Iterator[Comparison]:
    for row, counts_E in enumerate(whole.result.expert_counts_LE):
        errors = {n: _distance(r.result.expert_counts_LE[row], counts_E) for n, r in enumerate(records)}
        name = f"layers.{first_moe_layer + row}.moe"
        near = whole.margins[name] < NEAR_TIE
        yield _worst(COUNTS, name, whole.step, errors, "a token is near a tie between experts" if near else "")


def _pieces(
    kind: Kind, step: int, whole: dict[str, Tensor], ranks: list[dict[str, Tensor]], held: list[dict[str, Rectangle]]
) -> Iterator[Comparison]:
    """Compare tensors that ranks hold in pieces: ‖difference‖ / ‖whole‖, each element once; of copies the worst."""
    for name in dict.fromkeys([*whole, *(name for rank in ranks for name in rank)]):
        # A parameter without elements on a rank may have no gradient there; a frozen one has none anywhere.
        holders = [n for n, rectangles in enumerate(held) if name in rectangles and rectangles[name].elements]
        have = [n for n in holders if name in ranks[n]]
        if (name in whole and have != holders) or (name not in whole and have):
            remark = "only some have one" if name in whole else "one process has none"
            rank = min(set(holders) - set(have), default=None) if name in whole else have[0]
            yield Comparison(kind=kind, name=name, step=step, rank=rank, error=inf, remark=remark)
            continue
        if not have:
            continue
        worst: dict[Rectangle, tuple[float, int]] = {}
        for n in have:
            piece = held[n][name]
            off = float((ranks[n][name].double() - whole[name][piece.slices].double()).square().sum())
            before = worst.get(piece, (-1.0, n))
            worst[piece] = before if before[0] >= off else (off, n)
        total = sqrt(sum(off for off, _ in worst.values()))
        _, rank = max(worst.values(), key=lambda pair: (_as_number(pair[0]), -pair[1]))
        yield Comparison(
            kind=kind, name=name, step=step, rank=rank, error=_ratio(total, float(whole[name].double().norm()))
        )


def _worst(kind: Kind, name: str, step: int, errors: dict[int, float], remark: str = "") -> Comparison:
    """Return the worst of `errors` by rank. If it is empty, no rank has the quantity."""
    if not errors:
        return Comparison(kind=kind, name=name, step=step, rank=None, error=inf, remark="not held by any rank")
    rank = max(errors, key=lambda n: (_as_number(errors[n]), -n))
    return Comparison(kind=kind, name=name, step=step, rank=rank, error=errors[rank], remark=remark)


def _distance(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, relative to the largest number. It is exactly 0 for equal tensors."""
    return _ratio(float((got - want).abs().max()), float(want.abs().max()))


def _relative(got: float, want: float) -> float:
    return _ratio(abs(got - want), abs(want))


def _ratio(off: float, size: float) -> float:
    """Return the ratio of two numbers. A number that should be zero must be zero."""
    return off / size if size else (0.0 if off == 0 else inf)
