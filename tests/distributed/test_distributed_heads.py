"""A weighted loss by a rule, log-probabilities, logits, scores and an evaluation under layouts of four ranks, against a naive
network in float64.

All layouts run on one pool of ranks: what is trained in float64, of which FSDP rounds gradients to float32, what is
read in float32. The test's process computes the same rows with a naive network."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from made_up_rows import (
    ROWS,
    STD,
    T,
    build,
    documents,
    evaluate_texts,
    make_recipe,
    make_requests,
    make_rows,
    parallel,
    score_requests,
)
from split_models import assemble
from steptron.config.schema import (
    ParallelConfig,
    Recipe,
)
from steptron.data.loader import Batch
from steptron.model.heads import TokenLoss
from steptron.model.init import initialise
from steptron.model.inputs import Inputs, Rows
from steptron.model.transformer import Transformer
from steptron.nn.shard_geometry import rectangle
from steptron.nn.to_local import local
from steptron.parallel.mesh import Meshes, build_meshes, data_rank, resolve_layout
from steptron.parallel.network import InTurn, Network
from steptron.parallel.objective import Objective
from steptron.prove.trial import fill_vectors
from steptron.train.batch import row_ranges, step_batch
from steptron.train.instrumentation import watch_network
from steptron.train.step import StepBatch
from torch import Tensor

from naive import Naive, naive_state
from ranks import run_ranks

pytestmark = pytest.mark.takes(60)

RANKS = 4
CLOSE, NEAR = 1e-6, 1e-5
"""Relative errors of a gradient by its norm; absolute ones of log-probabilities and logits."""


LAYOUTS = {
    "dp 4": (1, parallel()),
    "tp 2": (1, parallel(tp=2, etp=2)),
    "ep 2": (1, parallel(ep=2)),
    "cp 2": (2, parallel(cp=2)),
    "pp 2, tp 2, ep 2": (2, parallel(pp=2, tp=2, ep=2)),
    "pp 2 interleaved, cp 2": (2, parallel(pp=2, schedule="interleaved", cp=2)),
    "pp 2 in a V, tp 2": (2, parallel(pp=2, schedule="zb-v", tp=2)),
}
"""Rows of a micro-batch, and the layout. A step has 1 micro-batch, and 2 under "tp 2" and pipelines."""


def make_batch(indices: range) -> Batch:
    """Return a micro-batch of these rows."""
    rows = [make_rows(index) for index in indices]
    parts = {field.name: torch.cat([getattr(row, field.name) for row in rows], dim=-2) for field in fields(Rows)}
    return Batch(Rows(**parts), ("text",) * len(rows))


def scaled(log_prob: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy times a constant, as a rule."""
    return -constant * log_prob, -constant


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Networks that are built inside have parameters of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def objective(weights_H: Tensor) -> Objective:
    return Objective(loss=TokenLoss(scaled), scale_H=(1 / weights_H).float(), balance_scale=0.0)


def on_rank(rank: int) -> dict[str, dict[str, Any]]:
    """Return what this rank has read and trained under each layout, as arrays."""
    return {name: run_layout(layout, micro_batch) for name, (micro_batch, layout) in LAYOUTS.items()}


def run_layout(layout: ParallelConfig, micro_batch: int) -> dict[str, Any]:
    recipe = make_recipe(layout, micro_batch)
    meshes = build_meshes(resolve_layout(layout, RANKS), "cpu")
    ranges = row_ranges(0, ROWS, micro_batch, data_rank(meshes), meshes.layout.data_ranks)
    batch = step_batch([make_batch(rows) for rows in ranges], T, meshes, torch.device("cpu"), ["text"])
    with default_dtype(torch.float64):
        trained = train_all(recipe, meshes, batch)
    network = build(recipe, meshes)
    return trained | {
        "rows": [index for rows in ranges for index in rows],
        "places": [p for start, stop in batch.inputs[0].packing.pieces for p in range(start, stop)],
        "weights": batch.weights_H.tolist(),
        "evaluation": evaluate_texts(network, meshes, micro_batch),
        "scores": score_requests(network, meshes, micro_batch),
        "read": read_all(network, batch.inputs),
    }


def read_all(network: Network, inputs: list[Inputs]) -> dict[str, list[np.ndarray]]:
    """What is read before and after the weights change."""
    read = {"log_probs": network.log_probs(inputs), "logits": network.logits(inputs)}
    with torch.no_grad():
        for _, p in network.named_parameters():
            local(p).mul_(1.25)
    network.values_changed()
    read["log_probs of other weights"] = network.log_probs(inputs)
    return {name: [row.numpy() for value in values for row in value] for name, values in read.items()}


def train_all(recipe: Recipe, meshes: Meshes, batch: StepBatch) -> dict[str, Any]:
    """Gradients of a step, and what is changed in another by reading and evaluation before it and by other masked targets."""
    network = build(recipe, meshes)
    seen = watch_network(recipe.monitor, meshes, network, ["text"], T)

    def train(inputs: list[Inputs]) -> dict[str, Tensor]:
        """All that a step sees: sums, expert counts, statistics, gradients."""
        for _, p in network.named_parameters():
            p.grad = None
        sums = network.forward_backward(inputs, objective(batch.weights_H))
        counts = {f"counts {n}": moe.take_counts() for n, moe in network.moe_layers().items()}
        found = {"sums": sums, **counts, "statistics": seen.plane.values.clone()}
        seen.plane.reset()
        return found | {n: local(p.grad).clone() for n, p in network.named_parameters() if p.grad is not None}

    first = train(batch.inputs)
    network.log_probs(batch.inputs)
    evaluate_texts(network, meshes, batch.inputs[0].packing.rows)
    again = train([without_masked(inputs) for inputs in batch.inputs])
    parts = {n: (rectangle(p).slices, first[n].numpy()) for n, p in network.named_parameters() if n in first}
    return {
        "gradients": parts,
        "changed": different(first, again),
    }


def without_masked(inputs: Inputs) -> Inputs:
    """The same with other targets and constants wherever a weight is 0."""
    masked_HBT = inputs.weights_HBT == 0
    assert masked_HBT.any()
    return replace(
        inputs,
        targets_HBT=torch.where(masked_HBT, (inputs.targets_HBT + 1) % 50, inputs.targets_HBT),
        constants_KBT=torch.where(masked_HBT[:1], 1e6, inputs.constants_KBT),
    )


def different(first: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in first.keys() | other.keys() if not same(first.get(name), other.get(name))]


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, dict[str, Any]]]:
    """Of each rank, by layout."""
    return run_ranks(RANKS, on_rank, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """The naive network's."""
    recipe = make_recipe(parallel())
    config, stage, rows = recipe.model, recipe.stages["only"], [make_rows(n) for n in range(ROWS)]
    tokens, documents = ([getattr(row, name)[0].tolist() for row in rows] for name in ("tokens_BS", "documents_BS"))
    weights = [row.weights_BS[0].tolist() for row in rows]
    products = [(row.weights_BS * row.constants_KBS[0])[0].tolist() for row in rows]
    state = naive_values(recipe, torch.float64)
    trained = Naive(config, stage, state)
    _, *heads = trained.losses(tokens, documents, T, weights)
    log_probs_BT = next_log_probs(trained, tokens)
    heads.insert(
        0,
        sum(
            -products[row][t + 1] * log_probs_BT[row, t]
            for row, d in enumerate(documents)
            for t in range(T)
            if d[t] == d[t + 1]
        ),
    )
    totals = [
        sum(w[t + h + 1] for d, w in zip(documents, weights, strict=True) for t in range(T) if d[t] == d[t + h + 1])
        for h in range(len(heads))
    ]
    sum(head / total for head, total in zip(heads, totals, strict=True)).backward()
    values = {name: t.detach() for name, t in naive_values(recipe, torch.float32).items()}
    naive = Naive(config, stage, values)
    other = Naive(config, stage, {name: t if "bias" in name else 1.25 * t for name, t in values.items()})
    known = [[1.0] * (T + 3 * (row < ROWS - 1)) + [0.0] * 3 for row in range(ROWS)]  # the last row ends the text
    all_heads = naive.losses(tokens, documents, T, known)
    other.losses(tokens, documents, T)
    return {
        "evaluation": evaluated(next_log_probs(naive, tokens), documents),
        "evaluated heads": [
            float(total)
            / sum(known[row][t + h + 1] for row, d in enumerate(documents) for t in range(T) if d[t] == d[t + h + 1])
            for h, total in enumerate(all_heads)
        ],
        "weights": totals,
        "gradients": {name: t.grad for name, t in state.items() if t.grad is not None},
        "logits": torch.cat(naive.logits).view(ROWS, T, -1),
        "log_probs": next_log_probs(naive, tokens),
        "log_probs of other weights": next_log_probs(other, tokens),
    }


def naive_values(recipe: Recipe, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a network of that type starts with, as float64."""
    with default_dtype(dtype):
        model = Transformer(recipe.model)
        initialise(model, recipe.seed, STD)
        fill_vectors(Network({0: model}, InTurn(model), None), 0.3)
    return naive_state(model)


def next_log_probs(naive: Naive, tokens: list[list[int]]) -> Tensor:
    """log p of the token after each position [ROWS, T], also where another document begins there."""
    logits = torch.cat(naive.logits).view(ROWS, T, -1)
    after = torch.tensor([row[1 : T + 1] for row in tokens])
    return torch.log_softmax(logits, -1).gather(2, after[:, :, None]).squeeze(2)


def evaluated(log_probs_BT: Tensor, documents: list[list[int]]) -> dict[str, float]:
    """The scalars of an evaluation of the output matrix, from the log-probabilities of all rows."""
    nats: dict[str, list[float]] = {}
    for row, d in enumerate(documents):
        for t in range(T):
            for name, rows in (("all", ROWS), ("short", 1)):
                if row < rows and d[t] == d[t + 1] and (row, t) != (rows - 1, T - 1):
                    bucket = 0 if t - d.index(d[t]) < 16 else 16
                    for key in ("loss", f"loss/{name}", f"position/{bucket}"):
                        nats.setdefault(f"eval/{key}", []).append(-float(log_probs_BT[row, t]))
    values = {key: sum(found) / len(found) for key, found in nats.items()}
    for name, bytes_per_token in (("all", 100 / (ROWS * T)), ("short", 30 / T)):
        loss = values[f"eval/loss/{name}"]
        values[f"eval/perplexity/{name}"] = math.exp(loss)
        values[f"eval/bits_per_byte/{name}"] = loss / math.log(2) / bytes_per_token
    bytes_ = sum(len(nats[f"eval/loss/{name}"]) * n for name, n in (("all", 100 / (ROWS * T)), ("short", 30 / T)))
    bits = sum(nats["eval/loss"]) / math.log(2)
    values["targets"] = len(nats["eval/loss/all"])
    return values | {"eval/perplexity": math.exp(values["eval/loss"]), "eval/bits_per_byte": bits / bytes_}


def check_evaluation(found: list[tuple[dict[str, float], list[float]]], expected: dict[str, Any]) -> None:
    for scalars, heads in found:
        known = {name: scalars[name] for name in expected["evaluation"]}
        assert known == pytest.approx(expected["evaluation"], rel=NEAR)
        assert heads == pytest.approx(expected["evaluated heads"], rel=NEAR)
        assert scalars.keys() - known.keys() == {"eval/mtp/1", "eval/mtp/2"}
        assert scalars == found[0][0], "every rank has the same numbers"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_evaluation_is_the_naive_network_s(found, expected, layout):
    check_evaluation([rank[layout]["evaluation"] for rank in found], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_of_requests_are_the_naive_network_s(found, expected, layout):
    assert [rank[layout]["scores"] for rank in found[1:]] == [None] * (RANKS - 1)
    scores, requests = found[0][layout]["scores"], make_requests()
    places = [
        (row, end - 1 - len(r.continuation), end) for (row, _, end), r in zip(documents(), requests, strict=False)
    ]
    row, start, _ = documents()[0]
    places += [(row, start, start + 2)] * 50
    greedy = []
    for request, score, (row, first, end) in zip(requests, scores, places, strict=True):
        logits_CV = expected["logits"][row, first : end - 1].detach()
        targets_C = torch.tensor(request.continuation)
        wanted = torch.log_softmax(logits_CV, -1).gather(1, targets_C[:, None]).sum()
        assert score.log_prob == pytest.approx(float(wanted), abs=NEAR * len(request.continuation))
        assert score.greedy == torch.equal(logits_CV.argmax(-1), targets_C)
        greedy.append(score.greedy)
    assert sum(greedy[-50:]) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rule_equal_to_weighted_cross_entropy_has_its_gradients(found, expected, layout):
    of_ranks = [rank[layout] for rank in found]
    for rank in of_ranks:
        assert rank["weights"] == pytest.approx(expected["weights"], rel=1e-6)
    errors = {}
    for name, wanted in expected["gradients"].items():
        whole = assemble([rank["gradients"] for rank in of_ranks], name, tuple(wanted.shape)).double()
        errors[name] = float((whole - wanted).norm() / wanted.norm())
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= CLOSE}
    assert not wrong, f"gradients are off by {wrong} of their norms"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["log_probs", "logits", "log_probs of other weights"])
def test_what_is_read_is_the_naive_network_s(found, expected, layout, what):
    seen = torch.zeros(ROWS, T, dtype=torch.int64)
    for rank in (rank[layout] for rank in found):
        for row, values in zip(rank["rows"], rank["read"][what], strict=True):
            got, wanted = torch.from_numpy(values), expected[what][row, rank["places"]]
            assert got.dtype is torch.float32
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=NEAR)
            seen[row, rank["places"]] += 1
    assert int(seen.min()) >= 1, "every token is read somewhere"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reading_and_masked_targets_do_not_change_a_bit_of_a_step(found, layout):
    for number, rank in enumerate(found):
        assert rank[layout]["changed"] == [], f"on rank {number}"
