"""SwiGLU with limits against autograd of its formula."""

import pytest
import torch
import torch.nn.functional as F
from steptron.nn.mlp import GatedMLP, clipped_swiglu
from torch import Tensor


def formula(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    if limit is None:
        return gate * torch.sigmoid(gate) * up
    return (gate * torch.sigmoid(gate)).clamp(max=limit) * up.clamp(-limit, limit)


@pytest.mark.parametrize("limit", [None, 0.1, 1.5, 7.0], ids=str)
def test_equals_formula(limit):
    torch.manual_seed(0)
    inputs = [(torch.randn(50, 40) * 4).requires_grad_() for _ in range(2)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y, expected = clipped_swiglu(*inputs, limit), formula(*exact, limit)
    if limit is not None:
        assert (F.silu(inputs[0]) > limit).any(), "the limit must bite for the test to mean anything"
    grad = torch.randn_like(y)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    grads, exact_grads = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, exact, grad.double())
    for got, wanted in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("limit", [None, 1.0], ids=str)
def test_gradients_by_finite_differences(limit):
    torch.manual_seed(0)
    inputs = [(torch.randn(4, 6, dtype=torch.float64) * 2).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(lambda gate, up: clipped_swiglu(gate, up, limit), inputs)


def test_at_the_limit_gradients_pass():
    """A value equal to the limit is not limited. `clamp` has let its gradient pass too, until torch 2.15 stopped it."""
    gate, up = torch.tensor([1.0], requires_grad=True), torch.tensor([F.silu(torch.tensor(1.0)).item()])
    limit = up.item()
    up.requires_grad_()
    got = torch.autograd.grad(clipped_swiglu(gate, up, limit).sum(), (gate, up))
    wanted = torch.autograd.grad((F.silu(gate) * up).sum(), (gate, up))
    torch.testing.assert_close(got, wanted)


def test_one_sided_on_the_gate_two_sided_on_up():
    gate, up = torch.tensor([-0.5, 100.0]), torch.tensor([-100.0, -100.0])
    expected = torch.tensor([F.silu(torch.tensor(-0.5)).item() * -7.0, 7.0 * -7.0])
    torch.testing.assert_close(clipped_swiglu(gate, up, 7.0), expected)


def test_module_uses_its_limit():
    torch.manual_seed(0)
    mlp, x = GatedMLP(8, 12), torch.randn(2, 5, 8) * 20
    for limit in (None, 0.5):
        mlp.limit = limit
        h = formula(x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T, limit)
        torch.testing.assert_close(mlp(x), h @ mlp.down_proj.weight.T)
