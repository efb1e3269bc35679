"""The experts' product through TransformerEngine's call, with a stand-in for it that is as strict as the real one is
careless.

Legend: P rows, K width of the input, N width of the output, E experts.
"""

import importlib.metadata
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from choices import planned
from steptron.errors import RecipeError
from steptron.moe import grouped_te
from steptron.moe.backend import Options, Weights
from steptron.moe.experts import make_backend
from steptron.moe.grouped_te import available, grouped_product
from torch import Tensor

K, N, E = 12, 8, 5
SIZES = {
    "all": [3, 16, 1, 7, 2],
    "some-empty": [0, 16, 0, 7, 0],
    "one": [0, 0, 0, 0, 9],
    "none": [0, 0, 0, 0, 0],
}
GROUPS = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
TAIL = pytest.mark.parametrize("tail", [0, 3], ids=["full", "tail"])


class StandIn:
    """`general_grouped_gemm` as in TransformerEngine 2.18 (transformer_engine/pytorch/cpp_extensions/gemm.py); the
    wheel of 2.20.2 has the same arguments. What its C++ side assumes, or checks, is checked here."""

    def __init__(self) -> None:
        self.layouts: list[str] = []

    def general_grouped_gemm(
        self,
        A: list[Tensor],
        B: list[Tensor],
        out: list[Tensor],
        quantization_params: list[None],
        out_dtype: torch.dtype,
        layout: str = "TN",
        m_splits: list[int] | None = None,
        gelu: bool = False,
        grad: bool = False,
        accumulate: bool = False,
        bias: list[Tensor] | None = None,
        use_bias: bool = False,
        use_split_accumulator: bool = False,
        D_dtype: object = None,
        single_output: bool = False,
    ):
        assert not any((gelu, accumulate, use_bias, bias, use_split_accumulator, D_dtype)), "not ours to use"
        assert len(A) == len(B) == len(quantization_params) > 0
        assert grad == (layout != "TN")
        for tensor in (*A, *B, *out):
            assert tensor.is_contiguous(), "strides are not read"
            assert tensor.dtype is out_dtype
            assert not tensor.requires_grad or not torch.is_grad_enabled()
        assert m_splits == [b.shape[0] for b in B]
        assert all(m_splits)
        self.layouts.append(layout)
        products = []
        # Matrices of cuBLAS are columns first, so its A is the right factor of what a reader of rows sees.
        for a, b in zip(A, B, strict=True):
            left, right = b.mT if layout[1] == "T" else b, a.mT if layout[0] == "T" else a
            products.append((left.double() @ right.double()).to(out_dtype))
        if single_output:
            assert len(out) == 1
            start = 0
            for product in products:  # by address, past no end
                assert out[0].shape[1] == product.shape[1]
                out[0][start : start + product.shape[0]] = product
                start += product.shape[0]
        else:
            for target, product in zip(out, products, strict=True):
                target.copy_(product)
        return out, [torch.empty(0)] * len(A), [torch.empty(0)] * len(A)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    engine = StandIn()
    names = ["transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.cpp_extensions"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[names[-1]])["general_grouped_gemm"] = engine.general_grouped_gemm
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    # Memory that is not written to is not a number, so that it is seen.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield engine
    torch.use_deterministic_algorithms(False)


def inputs(sizes: list[int], tail: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    rows = sum(sizes) + tail
    x, weight, grad = torch.randn(rows, K), torch.randn(E, N, K), torch.randn(rows, N)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), grad.to(dtype)


def one_by_one(x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    """The experts in a loop, each with its rows; a matrix of zeros for the rows after them."""
    rows, left = x.split([*sizes, x.shape[0] - sum(sizes)]), [*weight, torch.zeros_like(weight[0])]
    return torch.cat([part @ matrix.mT for part, matrix in zip(rows, left, strict=True)])


@GROUPS
@TAIL
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_equals_the_experts_one_by_one(sizes: list[int], tail: int, dtype: torch.dtype, tolerance: float, engine):
    x, weight, grad = inputs(sizes, tail, dtype)
    y = grouped_product(x, weight, sizes)
    found = (y, *torch.autograd.grad(y, [x, weight], grad))
    wide_x, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    wide = one_by_one(wide_x, wide_weight, sizes)
    expected = (wide, *torch.autograd.grad(wide, [wide_x, wide_weight], grad.double()))
    for got, want in zip(found, expected, strict=True):
        assert got.dtype is dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    assert engine.layouts == (["TN", "NN", "NT"] if sum(sizes) else [])


@GROUPS
def test_nothing_is_left_unwritten(sizes: list[int], engine: StandIn):
    """Experts without rows have a gradient of exactly 0, and so have rows after the last group."""
    x, weight, grad = inputs(sizes, 4, torch.float32)
    y = grouped_product(x, weight, sizes)
    grad_x, grad_weight = torch.autograd.grad(y, [x, weight], grad)
    assert [bool(g.any()) for g in grad_weight] == [size > 0 for size in sizes]
    assert not y[-4:].any()
    assert not grad_x[-4:].any()


def test_nobodys_rows_may_hold_anything(engine: StandIn):
    sizes = SIZES["some-empty"]
    x, weight, grad = inputs(sizes, 3, torch.float32)
    with torch.no_grad():
        x[-3:], grad[-3:] = float("nan"), float("nan")
    y = grouped_product(x, weight, sizes)
    for tensor in (y, *torch.autograd.grad(y, [x, weight], grad)):
        assert tensor.isfinite().all()


def test_the_weights_are_not_copied(engine: StandIn, monkeypatch: pytest.MonkeyPatch):
    x, weight, _ = inputs(SIZES["all"], 0, torch.float32)
    seen: list[int] = []
    real = sys.modules["transformer_engine.pytorch.cpp_extensions"].general_grouped_gemm
    monkeypatch.setattr(
        sys.modules["transformer_engine.pytorch.cpp_extensions"],
        "general_grouped_gemm",
        lambda A, *args, **kwargs: (seen.extend(a.data_ptr() for a in A), real(A, *args, **kwargs)),
    )
    grouped_product(x, weight, SIZES["all"])
    assert seen == [matrix.data_ptr() for matrix in weight]


def test_strided_rows_and_gradients(engine: StandIn):
    sizes = SIZES["all"]
    x, weight, grad = inputs(sizes, 0, torch.float64)
    expected = torch.autograd.grad(one_by_one(x, weight, sizes), [x, weight], grad)
    strided_x, strided_grad = (t.detach().mT.contiguous().mT for t in (x, grad))
    strided_x.requires_grad_()
    found = torch.autograd.grad(grouped_product(strided_x, weight, sizes), [strided_x, weight], strided_grad)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_only_what_is_asked_for_is_multiplied(engine: StandIn):
    x, weight, grad = inputs(SIZES["all"], 0, torch.float32)
    grouped_product(x.detach(), weight, SIZES["all"]).backward(grad)
    grouped_product(x, weight.detach(), SIZES["all"]).backward(grad)
    assert engine.layouts == ["TN", "NT", "TN", "NN"]


def test_float32_is_refused_where_tf32_is(engine: StandIn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    x, weight, _ = inputs(SIZES["all"], 0, torch.float32)
    with pytest.raises(RecipeError, match="TF32"):
        grouped_product(x, weight, SIZES["all"])
    grouped_product(x.bfloat16(), weight.bfloat16(), SIZES["all"])


@pytest.mark.parametrize(
    ("version", "device", "imports", "reason"),
    [
        (None, True, True, "not installed"),
        ("2.9.1", True, True, "2.9.1 is older than 2.11"),
        ("2.18.0", False, True, "CUDA device"),
        ("2.20.0.dev0+d0067d0", True, False, "cannot be imported: no.so here"),
        ("2.11.0", True, True, None),
        ("3.0", True, True, None),
    ],
    ids=["missing", "old", "no-device", "broken", "oldest", "newer"],
)
def test_available_says_why_not(
    version: str | None, device: bool, imports: bool, reason: str | None, engine, monkeypatch: pytest.MonkeyPatch
):
    def installed(name: str) -> str:
        assert name == "transformer-engine"
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    def broken() -> None:
        raise OSError("no.so\nhere")

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    if not imports:
        monkeypatch.setattr(grouped_te, "_gemm", broken)
    found = available()
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert "\n" not in found
        assert reason in found


def test_the_back_end_equals_the_cpus(engine):
    """Routing, products, SwiGLU and gradients, with an expert that has no rows."""
    torch.manual_seed(1)
    x, choice, grad = torch.randn(20, 16), torch.randint(4, (20, 2)), torch.randn(20, 16)
    given = [x, torch.rand(20, 2) + 0.1, torch.randn(5, 24, 16), torch.randn(5, 24, 16), torch.randn(5, 16, 24)]
    results = []
    for name in ("blocks", "transformer_engine"):
        x, weights, *parameters = (t.clone().requires_grad_() for t in given)
        backend = make_backend(name)
        plan = planned(choice, 5, backend.exact, backend.level)
        y, _ = backend.compute(x, weights, plan, Weights(*parameters), Options(1.0))
        results.append((y, *torch.autograd.grad(y, [x, weights, *parameters], grad)))
    assert engine.layouts, "the stand-in was asked"
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()
