"""The experts' matrix product through TransformerEngine: y = x · Wᵀ, each group of rows with the W of its expert.

TransformerEngine's `GroupedLinear` would own the parameters. The function that it calls, `general_grouped_gemm`, takes
lists of tensors and accepts views of our stacked parameters. It starts one cuBLAS product per group, on a few streams.

    forward    y[e] = x[e] · W[e]ᵀ      layout "TN": A = W, B = x
    backward   dx[e] = dy[e] · W[e]     layout "NN": A = W, B = dy
               dW[e] = dy[e]ᵀ · x[e]    layout "NT": A = x, B = dy

The function reads addresses and shapes but no strides, so every tensor is made contiguous first. Empty groups are left
out. It multiplies fp32 in TF32 regardless of PyTorch's setting; here that is an error unless PyTorch allows TF32 too.

Nothing here ran with the real TransformerEngine, which requires CUDA: the tests substitute a function with the same
signature. Three things are therefore known only from its sources: the import in `_gemm`, the call in `_multiply`, and
the case in which `available` returns None. The signature is that of releases 2.11 to 2.20; older releases take other
arguments.

Legend: P rows, K width of the input, N width of the output, E experts.
"""

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steptron.errors import RecipeError

OLDEST = (2, 11)
"""The oldest release whose `general_grouped_gemm` has the arguments used here."""


def _gemm() -> Callable[..., Any]:
    # Import it at first use: the import takes seconds, and the package is often not installed.
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm  # pyright: ignore[reportMissingImports]

    return general_grouped_gemm


def available() -> str | None:
    """Return None if TransformerEngine's product can run, otherwise the reason why it cannot, in one line."""
    try:
        installed = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return "transformer-engine is not installed: pip install 'steptron[transformer-engine]'"
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST:
        return f"transformer-engine {installed} is older than {'.'.join(map(str, OLDEST))}"
    if not torch.cuda.is_available():
        return "transformer-engine needs a CUDA device, and PyTorch sees none"
    try:
        _gemm()
    except (ImportError, OSError, RuntimeError) as error:  # a missing part or shared library
        return f"transformer-engine {installed} cannot be imported: {' '.join(str(error).split())}"
    return None


def _multiply(layout: str, a: list[Tensor], b: list[Tensor], out: list[Tensor], sizes: list[int]) -> None:
    """Write the products of `a` and `b` to `out`. A single tensor in `out` takes all products, one after the other."""
    if not a:
        return
    _gemm()(
        a,
        b,
        out,
        [None] * len(a),  # quantizers of the result
        out[0].dtype,
        layout=layout,
        m_splits=sizes,
        grad=layout != "TN",
        single_output=layout != "NT",
    )


class _Groups:
    """The experts that have rows, and the sizes of their groups."""

    def __init__(self, sizes: list[int]) -> None:
        self.experts = [expert for expert, size in enumerate(sizes) if size]
        self.empty = [expert for expert, size in enumerate(sizes) if not size]
        self.sizes = [size for size in sizes if size]
        self.rows = sum(sizes)

    def split(self, x: Tensor) -> list[Tensor]:
        """Return the rows of `x` of each group, as views."""
        return list(x[: self.rows].split(self.sizes)) if self.sizes else []

    def choose(self, weight_ENK: Tensor) -> list[Tensor]:
        """Return the matrix of each group, as views."""
        return [weight_ENK[expert] for expert in self.experts]

    def new_rows(self, like: Tensor, width: int) -> Tensor:
        """Allocate a result [P, width] in which rows after the last group are 0."""
        rows = like.new_empty(like.shape[0], width)
        rows[self.rows :].zero_()
        return rows


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PK: Tensor, weight_ENK: Tensor, sizes: list[int]) -> Tensor:
        groups = _Groups(sizes)
        x_PK, weight_ENK = x_PK.contiguous(), weight_ENK.contiguous()
        y_PN = groups.new_rows(x_PK, weight_ENK.shape[1])
        _multiply("TN", groups.choose(weight_ENK), groups.split(x_PK), [y_PN], groups.sizes)
        ctx.save_for_backward(x_PK, weight_ENK)
        ctx.groups = groups
        return y_PN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_PK, weight_ENK = ctx.saved_tensors
        groups, grad_y = ctx.groups, ctx.groups.split(grads[0].contiguous())
        grad_x_PK = grad_weight_ENK = None
        if ctx.needs_input_grad[0]:
            grad_x_PK = groups.new_rows(x_PK, x_PK.shape[1])
            _multiply("NN", groups.choose(weight_ENK), grad_y, [grad_x_PK], groups.sizes)
        if ctx.needs_input_grad[1]:
            grad_weight_ENK = torch.empty_like(weight_ENK)
            _multiply("NT", groups.split(x_PK), grad_y, groups.choose(grad_weight_ENK), groups.sizes)
            for expert in groups.empty:
                grad_weight_ENK[expert].zero_()
        return grad_x_PK, grad_weight_ENK, None


def grouped_product(
    x_PK: Float[Tensor, "P K"], weight_ENK: Float[Tensor, "E N K"], sizes: list[int]
) -> Float[Tensor, "P N"]:
    """Return x · Wᵀ by group: the first sizes[0] rows of `x` with weight[0], and so on; [P, N] in the dtype of `x`.

    TransformerEngine lays out its calls on the host, so `sizes` are on the host. A caller that counts rows on the
    device must wait for it once per layer. Rows after the last group are 0, and so is their gradient. An expert without
    rows gets a gradient of 0.

    Raises `RecipeError` for fp32 if `torch.get_float32_matmul_precision()` is "highest".
    """
    assert len(sizes) == weight_ENK.shape[0], f"{len(sizes)} groups, {weight_ENK.shape[0]} experts"
    assert sum(sizes) <= x_PK.shape[0], f"groups of {sum(sizes)} rows in all, {x_PK.shape[0]} rows"
    assert x_PK.dtype is weight_ENK.dtype, f"rows are {x_PK.dtype}, weights {weight_ENK.dtype}"
    if x_PK.dtype is torch.float32 and torch.get_float32_matmul_precision() == "highest":
        raise RecipeError(
            "transformer-engine multiplies float32 in TF32, with 10 bits of precision: train in bf16, choose another "
            "kernels.experts, or allow TF32 with torch.set_float32_matmul_precision('high')"
        )
    y_PN: Any = _GroupedProduct.apply(x_PK, weight_ENK, sizes)
    return y_PN
