"""The comparison by itself, on records made by hand."""

from dataclasses import replace
from math import nan

import pytest
import torch
from steptron.nn.shard_geometry import Rectangle
from steptron.prove import compare as kinds
from steptron.prove.compare import NEAR_TIE, RankRun, compare, first_offending, summarise, undecided
from steptron.prove.trial import Record
from steptron.train.step import StepResult

VALUES = torch.arange(1.0, 13).view(4, 3)
WHOLE, TOP, BOTTOM = (Rectangle((start, 0), (rows, 3)) for start, rows in ((0, 4), (0, 2), (2, 2)))


def record(rectangle: Rectangle, share: float = 1.0) -> Record:
    result = StepResult(
        terms={"loss": 2.0, "mtp_loss": 0.0, "balance_loss": 1.0, "total_loss": 3.0},
        target_weight=1.0,
        grad_norm=0.5,
        expert_counts_LE=torch.tensor([[3, 5]]),
    )
    values = VALUES[rectangle.slices].clone()
    return Record(
        step=1,
        result=result,
        outputs={"layers.1.attention": 8.0 * share, "layers.1.moe": 4.0 * share},
        margins={"layers.1.moe": 0.1},
        gradients={"w": values},
        parameters={"w": values},
        biases={"layers.1.moe.router.bias": torch.tensor([0.1, -0.1])},
        statistics=torch.zeros(0),
    )


def run(rectangle: Rectangle, share: float = 1.0) -> RankRun:
    return RankRun(rectangles={"w": rectangle}, records=[record(rectangle, share)])


def halves() -> list[RankRun]:
    return [run(TOP, 0.5), run(BOTTOM, 0.5)]


def changed(run: RankRun, **values: object) -> RankRun:
    return replace(run, records=[replace(run.records[0], **values)])  # type: ignore[arg-type]


def result_with(run: RankRun, **values: object) -> RankRun:
    return changed(run, result=replace(run.records[0].result, **values))  # type: ignore[arg-type]


def term_of(run: RankRun, **values: float) -> RankRun:
    return result_with(run, terms=run.records[0].result.terms | values)


def test_pieces_that_make_up_the_whole_hold_exactly():
    findings = compare(run(WHOLE), halves(), 1)
    assert first_offending(findings) is None
    assert {f.kind for f in findings} == set(kinds.KINDS)
    assert all(f.error == 0 for f in findings)


def test_the_error_is_of_the_whole_tensor_and_of_copies_the_worst_counts():
    ranks = [run(TOP, 0.25), run(BOTTOM, 0.25), run(TOP, 0.25), run(BOTTOM, 0.25)]
    ranks[2].records[0].gradients["w"][0, 0] += 3.0
    ranks[3].records[0].gradients["w"][0, 0] += 4.0
    found = first_offending(compare(run(WHOLE), ranks, 1))
    assert found is not None
    assert (found.kind, found.name, found.rank) == (kinds.GRADIENTS, "w", 3)
    assert found.error == pytest.approx(5.0 / float(VALUES.norm()))


@pytest.mark.parametrize(
    ("ranks", "remark"),
    [
        ([run(TOP, 0.5), replace(run(BOTTOM, 0.5), rectangles={})], "6 elements not held by any rank"),
        ([replace(r, rectangles={}) for r in halves()], "not held by any rank"),
        ([run(WHOLE, 0.5), run(BOTTOM, 0.5)], "6 elements in pieces that overlap"),
        ([replace(r, rectangles=r.rectangles | {"v": TOP}) for r in halves()], "not a parameter of one process"),
    ],
    ids=["half", "none", "overlap", "stranger"],
)
def test_what_is_held_is_counted(ranks: list[RankRun], remark: str):
    found = first_offending(compare(run(WHOLE), ranks, 1))
    assert found is not None
    assert (found.kind, found.remark) == (kinds.HELD, remark)


def test_a_frozen_parameter_has_a_gradient_on_neither_side():
    frozen = [changed(r, gradients={}) for r in halves()]
    assert first_offending(compare(changed(run(WHOLE), gradients={}), frozen, 1)) is None
    for reference, ranks in ((run(WHOLE), frozen), (changed(run(WHOLE), gradients={}), halves())):
        found = first_offending(compare(reference, ranks, 1))
        assert found is not None
        assert found.kind is kinds.GRADIENTS
    one_without = first_offending(compare(run(WHOLE), [halves()[0], frozen[1]], 1))
    assert one_without is not None
    assert one_without.rank == 1


def test_numbers_that_are_none_do_not_hold():
    ranks = [halves()[0], term_of(halves()[1], loss=nan)]
    found = first_offending(compare(run(WHOLE), ranks, 1))
    assert found is not None
    assert (found.kind, found.rank) == (kinds.LOSS, 1)
    assert next(f for f in summarise(compare(run(WHOLE), ranks, 1)) if f.kind is kinds.LOSS).rank == 1


MTP = 4.0
"""Loss of the MTP heads, where they are looked at."""


def off_by(kind: kinds.Kind, relative: float) -> list[RankRun]:
    """Two ranks of which the second is off by that much in one number, or in one tensor."""
    top, bottom = (term_of(half, mtp_loss=MTP) for half in halves())
    record = bottom.records[0]
    numbers = {
        kinds.LOSS: "loss",
        kinds.MTP_LOSS: "mtp_loss",
        kinds.BALANCE_LOSS: "balance_loss",
        kinds.TOTAL_LOSS: "total_loss",
    }
    if kind in numbers:
        name = numbers[kind]
        return [top, term_of(bottom, **{name: record.result.terms[name] * (1 + relative)})]
    if kind is kinds.NORM:
        return [top, result_with(bottom, grad_norm=record.result.grad_norm * (1 + relative))]
    if kind is kinds.OUTPUTS:
        return [top, changed(bottom, outputs=record.outputs | {"layers.1.moe": 2.0 + 4.0 * relative})]
    if kind in (kinds.GRADIENTS, kinds.PARAMETERS):
        values = VALUES[BOTTOM.slices].clone()
        values[0, 0] += relative * float(VALUES.norm())
        return [top, changed(bottom, **{kind.title: {"w": values}})]
    raise AssertionError(f"{kind} has no number here")


@pytest.mark.parametrize("kind", [k for k in kinds.KINDS if k.bound > 0], ids=lambda k: k.title)
def test_a_hundred_thousandth_is_the_most_that_holds(kind: kinds.Kind):
    """What fp32 sums in another order come to is near 1e-6; a fault of a rank among thousands may be as small as
    1e-4."""
    reference = term_of(run(WHOLE), mtp_loss=MTP)
    assert first_offending(compare(reference, off_by(kind, 5e-6), 1)) is None
    found = first_offending(compare(reference, off_by(kind, 5e-5), 1))
    assert found is not None
    assert found.kind is kind
    assert found.error == pytest.approx(5e-5, rel=0.01)


def test_one_token_more_or_less_does_not_hold():
    """A difference of 1 in 5,000, in the expert with the fewest tokens, is found; `undecided` says how near a tie it was."""
    reference = result_with(run(WHOLE), expert_counts_LE=torch.tensor([[3_000, 5_000]]))
    same = [result_with(rank, expert_counts_LE=torch.tensor([[3_000, 5_000]])) for rank in halves()]
    assert first_offending(compare(reference, same, 1)) is None
    for counts in ([3_000, 5_001], [2_999, 5_000], [3_001, 4_999]):
        ranks = [same[0], result_with(same[1], expert_counts_LE=torch.tensor([counts]))]
        found = first_offending(compare(reference, ranks, 1))
        assert found is not None, counts
        assert (found.kind, found.rank) == (kinds.COUNTS, 1)


def test_router_biases_are_bitwise_those_of_one_process():
    """They are sums of a few steps of the same size in any layout."""
    moved = {"layers.1.moe.router.bias": torch.tensor([0.1, -0.1]).nextafter(torch.tensor(1.0))}
    found = first_offending(compare(run(WHOLE), [halves()[0], changed(halves()[1], biases=moved)], 1))
    assert found is not None
    assert (found.kind, found.rank) == (kinds.BIASES, 1)


def test_what_is_zero_must_be_zero():
    ranks = [halves()[0], term_of(halves()[1], mtp_loss=1e-30)]
    found = first_offending(compare(run(WHOLE), ranks, 1))
    assert found is not None
    assert found.kind is kinds.MTP_LOSS


def test_a_dropped_layer_output_is_seen_before_the_losses():
    ranks = [changed(halves()[0], outputs={"layers.1.attention": 4.0}), term_of(halves()[1], loss=2.1)]
    found = first_offending(compare(run(WHOLE), ranks, 1))
    assert found is not None
    assert (found.kind, found.name) == (kinds.OUTPUTS, "layers.1.moe")


def test_only_a_count_near_a_tie_leaves_it_undecided():
    counts = torch.tensor([[4, 4]])
    ranks = [
        result_with(changed(r, outputs={"layers.1.attention": 4.0, "layers.1.moe": 2.1}), expert_counts_LE=counts)
        for r in halves()
    ]
    assert not undecided(compare(run(WHOLE), ranks, 1))
    near = changed(run(WHOLE), margins={"layers.1.moe": NEAR_TIE / 2})
    assert undecided(compare(near, ranks, 1))
    earlier = [changed(r, outputs={"layers.1.attention": 5.0, "layers.1.moe": 2.1}) for r in ranks]
    assert not undecided(compare(near, earlier, 1)), "the layer before was off already"
    assert not undecided(compare(near, halves(), 1))
