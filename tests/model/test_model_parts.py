"""Parts of the network, run one after the other, are compared with the complete network."""

from itertools import pairwise

import pytest
import torch
from steptron.model.heads import TokenLoss, head_log_probs, log_probs
from steptron.model.init import initialise
from steptron.model.inputs import Inputs, Rows
from steptron.model.parts import Unit, parts_of, units_of, whole
from steptron.model.transformer import Outputs, Transformer, apply_stage
from torch import Tensor

from tiny import tiny_model, tiny_stage

T = 20
MODEL = tiny_model(num_layers=3, layer_pattern="FS", vocab_size=20)
UNITS = units_of(MODEL)


def build(part) -> Transformer:
    model = Transformer(MODEL, part).double()
    initialise(model, 0, 0.2)
    apply_stage(model, tiny_stage(), num_groups=2)
    return model


def make_inputs(heads: int) -> Inputs:
    random = torch.Generator().manual_seed(3)
    tokens_BS = torch.randint(20, (2, T + 1 + heads), generator=random)
    documents_BS = (torch.rand(2, T + 1 + heads, generator=random) < 0.1).cumsum(1).int()
    return Inputs.from_rows(Rows.unweighted(tokens_BS, documents_BS), T)


def run(lengths: tuple[int, ...], heads: int) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """Return losses, gradients by name and two readings of the network in parts of these lengths."""
    inputs, passed, found = make_inputs(heads), (None,), ({}, {})
    models = [build(part) for part in parts_of(MODEL, lengths)]
    sums = None
    for model in models:
        *states, losses = passed
        outputs: Outputs = model(*states, sums=losses, inputs=inputs)
        sums = TokenLoss()(model, outputs, inputs)
        for reading, tensors in zip((log_probs, head_log_probs), found, strict=True):
            tensors |= reading.here(model, outputs, inputs)
        passed = (*outputs.states, torch.cat([sums.heads_H, sums.balance[None]]))
    assert sums is not None
    assert len(passed) == 1, "nothing but the losses is left behind the last part"
    (sums.heads_H.sum() + sums.balance).backward()
    gradients: dict[str, Tensor] = {}
    for model in models:
        for name, p in model.named_parameters():
            if p.grad is not None:
                gradients[name] = gradients[name] + p.grad if name in gradients else p.grad
    return [*sums.heads_H, sums.balance], gradients, [log_probs.joined(found[0]), head_log_probs.joined(found[1])]


@pytest.fixture(scope="module")
def complete() -> dict[int, tuple[list[Tensor], dict[str, Tensor], list[Tensor]]]:
    """The complete network's, by the number of MTP heads that run."""
    return {heads: run((len(UNITS),), heads) for heads in range(MODEL.num_mtp_heads + 1)}


def one_border(stop: int) -> tuple[int, ...]:
    return stop, len(UNITS) - stop


@pytest.mark.parametrize("heads", range(MODEL.num_mtp_heads + 1))
@pytest.mark.parametrize(
    "lengths",
    [(1,) * len(UNITS), *(one_border(stop) for stop in range(1, len(UNITS)))],
    ids=lambda lengths: "-".join(map(str, lengths)),
)
def test_parts_compute_what_the_complete_network_does(complete, lengths: tuple[int, ...], heads: int) -> None:
    losses, gradients, readings = run(lengths, heads)
    expected_losses, expected_gradients, expected_readings = complete[heads]
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected_losses), rtol=1e-9, atol=1e-12)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-9, atol=1e-12)
    for reading, expected in zip(readings, expected_readings, strict=True):
        torch.testing.assert_close(reading, expected, rtol=1e-5, atol=1e-6)


def test_parameters_of_parts_are_those_of_the_network_and_of_a_second_embedding() -> None:
    names = [
        name for part in parts_of(MODEL, (1,) * len(UNITS)) for name, _ in Transformer(MODEL, part).named_parameters()
    ]
    copies = ["embedding.weight"] * MODEL.num_mtp_heads
    assert sorted(names) == sorted([*(n for n, _ in Transformer(MODEL, whole(MODEL)).named_parameters()), *copies])


def test_each_unit_sends_what_the_next_one_receives() -> None:
    parts = parts_of(MODEL, (1,) * len(UNITS))
    for heads in range(MODEL.num_mtp_heads + 1):
        assert all(a.sent(heads) == b.received(heads) for a, b in pairwise(parts))
        assert parts[-1].sent(heads) == ()
    by_unit = {part.units[0]: part for part in parts}
    assert by_unit[Unit("output", 0)].sent(2) == (0,), "the first block reads the backbone's state"
    assert by_unit[Unit("block", 1)].sent(2) == (1,)
    assert by_unit[Unit("block", 2)].sent(2) == (1, 2), "both states have an output matrix to come"
    assert by_unit[Unit("output", 1)].sent(2) == (2,)
