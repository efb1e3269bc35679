"""The clip of the global gradient norm, on one process."""

import pytest
import torch
from steptron.parallel.grad_norm import clip_gradients
from torch import nn


def some_parameters(largest: float) -> list[nn.Parameter]:
    """Parameters whose gradients have this global norm, and one that has none."""
    random = torch.Generator().manual_seed(7)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((5, 3), (4,), (2,))]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn(parameter.shape, generator=random)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    for parameter in parameters[:2]:
        assert parameter.grad is not None
        parameter.grad *= largest / norm
    return parameters


def gradients(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad.clone() for p in parameters if p.grad is not None]


@pytest.mark.parametrize("norm", [0.0, 1e-9, 0.3, 0.99])
def test_gradients_below_the_bound_stay_bitwise(norm: float):
    parameters = some_parameters(norm)
    before = gradients(parameters)
    clip_gradients(parameters, torch.tensor(norm, dtype=torch.float64), max_norm=1.0)
    for was, now in zip(before, gradients(parameters), strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize("norm", [1.5, 40.0])
def test_gradients_above_the_bound_keep_their_direction_and_get_its_norm(norm: float):
    parameters = some_parameters(norm)
    before = gradients(parameters)
    clip_gradients(parameters, torch.tensor(norm, dtype=torch.float64), max_norm=0.5)
    for was, now in zip(before, gradients(parameters), strict=True):
        torch.testing.assert_close(now, was * (0.5 / norm), rtol=1e-5, atol=0)
    assert parameters[2].grad is None
