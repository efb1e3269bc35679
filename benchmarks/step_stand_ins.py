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
from steptron.moe import experts
from steptron.nn import attention, loss, norm
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
        if choices.fused:
            for target, name, stand_in in _fused(traced):
                stack.enter_context(patch.object(target, name, stand_in))
        yield


def _fused(traced: Traced) -> list[tuple[Any, str, Any]]:
    """Return the functions that are one kernel each when fused: where they are, their names and their stand-ins."""

    def one(name: str) -> Callable[..., Tensor]:
        def run(x: Tensor, *others: Any) -> Tensor:
            return _OneKernel.apply(traced, name, x, *others)  # pyright: ignore[reportReturnType]

        return run

    gate = one("gate")

    def attend(self: attention.Attention, x_BTD: Tensor, packing: Any, rope: tuple[Tensor, Tensor]) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        q, k, v = (p(x_ND).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (attention.apply_rope(n(t), *rope) for n, t in ((self.q_norm, q), (self.k_norm, k)))
        gated = gate(self.kernel(q, k, v, packing), self.gate_proj(x_ND))
        return self.o_proj(gated.flatten(1)).view(x_BTD.shape)

    plan_rows, rows_to_send = experts.plan_rows, expert_parallel._rows_to_send
    return [
        (norm, "rms_norm", one("norm")),
        (attention, "apply_rope", one("rope")),
        (attention.Attention, "forward", attend),
        (experts, "plan_rows", partial(_few_kernels, traced, plan_rows, 3)),
        (expert_parallel, "_rows_to_send", partial(_few_kernels, traced, rows_to_send, 2)),
    ]


class _OneKernel(torch.autograd.Function):
    """An operation that is one kernel forward and one backward. Backward reads what forward read."""

    @staticmethod
    def forward(ctx: Any, traced: Traced, name: str, x: Tensor, *others: Any) -> Tensor:
        ctx.traced, ctx.name = traced, name
        ctx.save_for_backward(x, *(t for t in others if isinstance(t, Tensor)))
        y = torch.empty_like(x)
        traced.launch(name, (x, others, y))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = ctx.saved_tensors
        made = [torch.empty_like(t) for t, needed in zip(saved, ctx.needs_input_grad[2:], strict=False) if needed]
        ctx.traced.launch(f"{ctx.name} backward", (saved, grads, made))
        given = iter(made)
        return None, None, *(next(given) if needed else None for needed in ctx.needs_input_grad[2:])


def _few_kernels(traced: Traced, function: Callable[..., Any], kernels: int, *args: Any) -> Any:
    """Call a function that makes tables, and count it as a few kernels that read its inputs and write its result."""
    before = len(traced.marks)
    made = function(*args)
    del traced.marks[before:]
    for _ in range(kernels):
        traced.launch(function.__name__, (args, made))
    return made


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
