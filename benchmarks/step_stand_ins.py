"""Stand-ins on the meta device: for what it does not have, for code that is not written, and for code that is gone.

An operation that would be one kernel is launched as one, which reads its inputs and writes its result.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import gpu_count
import torch
import torch.nn.functional as F
from step_marks import Choices, Kernel, Traced
from torch import Tensor

from steptron.config.schema import ModelConfig
from steptron.nn import loss
from steptron.parallel import ep as expert_parallel


@contextmanager
def stand_ins(traced: Traced, model: ModelConfig, tokens: int, ep: int, choices: Choices) -> Iterator[None]:
    """Replace what the meta device does not have, and what the choices change."""
    moe, dispatcher = model.moe, expert_parallel.AllToAllDispatcher
    with ExitStack() as stack:
        stack.enter_context(gpu_count.stand_ins(traced, tokens, moe.num_experts // ep, moe))
        # CUDA multiplies bf16 operands into fp32 results.
        stack.enter_context(patch.object(loss, "_logits_operand", lambda weight_VD: weight_VD))
        count = dispatcher._count

        def counted(self: Any, sent: Tensor) -> tuple[list[int], list[int], int]:
            away, here, num_here = count(self, sent)
            if choices.all_choices:
                num_here = sum(here) * moe.top_k
            away, here = ([round(choices.load * rows) for rows in one] for one in (away, here))
            num_here = round(choices.load * num_here)
            return away, here, num_here

        stack.enter_context(patch.object(dispatcher, "_count", counted))
        if choices.fused_loss:
            softmax = loss._softmax
            stack.enter_context(patch.object(loss, "_softmax", partial(_fused_softmax, traced, softmax)))
        yield


def _fused_softmax(traced: Traced, softmax: Callable[..., Any], x_CD: Tensor, operand_VD: Tensor, *others: Any) -> Any:
    """Return softmax's result after the product and one kernel, which reads the logits in fp32 and writes their
    gradient in bf16: nothing is left for the lines that make it from the probabilities."""
    before = len(traced.marks)
    found = softmax(x_CD, operand_VD, *others)
    product = next(mark for mark in traced.marks[before:] if isinstance(mark, Kernel) and mark.kind == "product")
    narrow_CV = found.probabilities_CV.to(x_CD.dtype)
    del traced.marks[before:]
    traced.marks.append(product)
    traced.launch("fused softmax", (found.probabilities_CV, narrow_CV))
    return found._replace(probabilities_CV=narrow_CV)


def gate_and_up(plan: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return grouped products of which those of gate and up are one, with a matrix of twice the width."""
    ends_E = plan.groups_E.cumsum(0, dtype=torch.int32)
    rest: list[Tensor] = []

    def product(rows_PK: Tensor, weights_ENK: Tensor) -> Tensor:
        if rest:
            return rest.pop()
        E, N, K = weights_ENK.shape
        if N > K:  # the down projection
            return F.grouped_mm(rows_PK, weights_ENK.mT, offs=ends_E)
        joined = weights_ENK.new_empty(E, 2 * N, K).requires_grad_()
        first, second = _Halves.apply(F.grouped_mm(rows_PK, joined.mT, offs=ends_E))  # pyright: ignore
        rest.append(second)
        return first

    return product


class _Halves(torch.autograd.Function):
    """The two halves of a product's columns, which its kernel writes apart."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> tuple[Tensor, Tensor]:
        half = (*both.shape[:-1], both.shape[-1] // 2)
        return both.new_empty(half), both.new_empty(half)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].new_empty(*grads[0].shape[:-1], 2 * grads[0].shape[-1])
