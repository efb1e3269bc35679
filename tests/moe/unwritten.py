"""`grouped_mm` as a GPU runs it: rows after the last group are left as they were, here NaN, forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from steptron.moe import grouped_experts
from torch import Tensor

grouped_mm = F.grouped_mm


class _Unwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_PK: Tensor, weights_EKN: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(rows_PK, weights_EKN, ends_E)
        out = grouped_mm(rows_PK, weights_EKN, offs=ends_E)
        out[int(ends_E[-1]) :] = torch.nan
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_PK, weights_EKN, ends_E = ctx.saved_tensors
        with torch.enable_grad():
            given = [t.detach().requires_grad_() for t in (rows_PK, weights_EKN)]
            out = grouped_mm(*given, offs=ends_E)
        grad_rows, grad_weights = torch.autograd.grad(out, given, grads[0])
        grad_rows[int(ends_E[-1]) :] = torch.nan
        return grad_rows, grad_weights, None


@contextmanager
def unwritten_rows_are_nan() -> Iterator[list[int]]:
    """Yield the number of such rows of each product."""
    rows: list[int] = []

    def product(rows_PK: Tensor, weights_EKN: Tensor, offs: Tensor) -> Any:
        rows.append(len(rows_PK) - int(offs[-1]))
        return _Unwritten.apply(rows_PK, weights_EKN, offs)

    with patch.object(grouped_experts.F, "grouped_mm", product):
        yield rows
