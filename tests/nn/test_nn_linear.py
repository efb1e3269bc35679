"""The linear layer and the product under it, against plain matrix products in fp64."""

import pytest
import torch
import torch.nn.functional as F
from steptron.nn import matmul
from steptron.nn.linear import Linear
from steptron.nn.matmul import matmul_nt, write_products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "one row"])
@pytest.mark.parametrize("family", [0, 25], ids=["intel", "amd"])
def test_product_of_any_layout(layout, dtype, family, monkeypatch):
    monkeypatch.setattr(matmul, "_amd_family", lambda: family)
    monkeypatch.setattr(matmul, "SMALL", 0)
    torch.manual_seed(0)
    a, b = {
        "contiguous": (torch.randn(33, 17), torch.randn(40, 17)),
        "transposed": (torch.randn(17, 33).mT, torch.randn(17, 40).mT),
        "strided": (torch.randn(33, 3, 17)[:, 1], torch.randn(40, 34)[:, ::2]),
        "one row": (torch.randn(1, 17), torch.randn(1, 17)),
    }[layout]
    a, b = a.to(dtype), b.to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float64: 1e-12}[dtype]
    expected = a.double() @ b.double().mT
    torch.testing.assert_close(matmul_nt(a, b).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("leading", [(7,), (2, 7), (2, 3, 7)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)], ids=["fp32", "bf16"])
def test_layer_and_its_gradients(leading, dtype, tolerance):
    torch.manual_seed(0)
    layer = Linear(12, 20).to(dtype)
    x = torch.randn(*leading, 12, dtype=dtype).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, layer.weight)]
    y, expected = layer(x), F.linear(*exact)
    grad = torch.randn_like(y)
    assert y.shape == expected.shape
    grads = torch.autograd.grad(y, (x, layer.weight), grad)
    exact_grads = torch.autograd.grad(expected, exact, grad.double())
    for got, wanted in zip((y, *grads), (expected, *exact_grads), strict=True):
        assert (got.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_layer_takes_an_expanded_gradient():
    layer = Linear(4, 6)
    layer(torch.ones(5, 4)).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, torch.full((6, 4), 5.0))


def test_layer_is_an_nn_linear_without_bias():
    layer = Linear(4, 6)
    assert isinstance(layer, torch.nn.Linear)
    assert layer.bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_rows(dtype):
    layer, x = Linear(4, 6).to(dtype), torch.randn(0, 4, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 6)
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


PRODUCTS = {
    "plain": lambda: (torch.empty(3, 5, 7), torch.randn(3, 5, 4), torch.randn(3, 7, 4)),
    "one pair": lambda: (torch.empty(1, 5, 7), torch.randn(1, 5, 4), torch.randn(1, 7, 4)),
    "transposed": lambda: (torch.empty(3, 5, 7), torch.randn(3, 4, 5).mT, torch.randn(3, 4, 7).mT),
    "one pair, transposed": lambda: (torch.empty(1, 5, 7), torch.randn(1, 4, 5).mT, torch.randn(1, 4, 7).mT),
    "a view": lambda: (torch.empty(5, 5, 7)[1:4], torch.randn(15, 4).unflatten(0, (3, 5)), torch.randn(9, 7, 4)[2:5]),
}


@pytest.mark.parametrize("make", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", [0, 25, matmul.ZEN_5], ids=["intel", "zen 4", "zen 5"])
def test_products_of_several_pairs(make, dtype, family, monkeypatch):
    monkeypatch.setattr(matmul, "_amd_family", lambda: family)
    monkeypatch.setattr(matmul, "SMALL", 0)
    out, a, b = (t.to(dtype) if t.is_contiguous() else t.mT.to(dtype).mT for t in make())
    want = torch.stack([x.double() @ y.double().mT for x, y in zip(a, b, strict=True)])
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}[dtype]
    write_products(out, a, b)
    assert (out.double() - want).norm() <= tolerance * want.norm()
    write_products(out, a, b, add=True)
    assert (out.double() - 2 * want).norm() <= tolerance * 2 * want.norm()
