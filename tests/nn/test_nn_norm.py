"""RMSNorm against its formula in fp64."""

import pytest
import torch
from steptron.nn.norm import RMSNorm, rms_norm
from torch import Tensor


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 7, 3, 64)], ids=str)
def test_equals_formula(shape, dtype, tolerance):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=dtype) * 3, torch.randn(64, dtype=dtype)
    inputs = [t.requires_grad_() for t in (x, weight)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y, expected = rms_norm(*inputs, 1e-5), formula(*exact, 1e-5)
    grad = torch.randn_like(y)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    grads, exact_grads = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, exact, grad.double())
    for got, wanted in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    # A strided row (heads first, say) must do too.
    assert torch.autograd.gradcheck(
        lambda x, w: rms_norm(x.transpose(0, 1), w, 1e-5), (x.requires_grad_(), weight.requires_grad_())
    )


def test_eps_keeps_small_rows_small():
    x = torch.full((1, 4), 1e-6)
    torch.testing.assert_close(rms_norm(x, torch.zeros(4), 1e-5), formula(x, torch.zeros(4), 1e-5))


def test_starts_as_a_plain_rms_norm():
    norm = RMSNorm(8, 1e-5)
    assert torch.equal(norm.weight, torch.zeros(8))
    x = torch.randn(3, 8)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (8,), eps=1e-5))
