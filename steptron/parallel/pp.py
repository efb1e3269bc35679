"""Pipeline parallel: a rank runs its stages' forward and backward passes in the order of torch's schedules.

    micro-batches ─► [stage 0] ─ hidden states, balance loss so far ─► [stage 1] ─► … ─► [last] ─► losses
                               ◄─ their gradients ─

Every rank reads the micro-batches itself and gives its stages their own inputs (tokens, borders, positions) by number; between
stages travel only hidden states [B, T, D] and the balance loss. The last stage's loss is the whole objective: a stage's balance loss
goes along to it, and its gradient comes back the same way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from steptron.config.schema import PipelineConfig
from steptron.model.inputs import Inputs
from steptron.model.transformer import LossSums, Transformer
from steptron.parallel.objective import Objective

SCHEDULES = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zb-v": ScheduleZBVZeroBubble,
    "dualpipe-v": ScheduleDualPipeV,
}


@dataclass(kw_only=True)
class _Step:
    """What the stages' hooks need while a step runs."""

    inputs: list[Inputs]
    objective: Objective
    sums: Tensor


class Pipeline:
    """Runs the micro-batches of a step through this rank's stages."""

    def __init__(
        self,
        parts: dict[int, Transformer],
        config: PipelineConfig,
        stages: int,
        group: ProcessGroup,
        activations: torch.dtype,
        tp: int,
    ) -> None:
        """`parts`: this rank's stages by number, of `stages` in all. `activations`: dtype of hidden states; `tp`: slices of a sequence."""
        self._parts, self._config, self._stages, self._group = parts, config, stages, group
        self._activations, self._tp = activations, tp
        self._schedules: dict[tuple[int, int, int], PipelineScheduleSingle | PipelineScheduleMulti] = {}
        self._running: _Step | None = None
        for part in parts.values():
            part.register_forward_pre_hook(self._feed, with_kwargs=True, prepend=True)
            part.register_forward_hook(lambda module, args, output: tuple(output))

    def run(self, inputs: list[Inputs], objective: Objective) -> Tensor:
        """Forward and backward of all micro-batches; this rank's sums of the loss terms (zeros where the last stage is elsewhere)."""
        _, B, T = inputs[0].tokens_HBT.shape
        self._running = step = _Step(inputs=inputs, objective=objective, sums=objective.zeros())
        schedule = self._schedule(len(inputs), B, T)
        number = torch.arange(len(inputs))
        has_last = any(part.part.last for part in self._parts.values())
        schedule.step(number=number, target=number if has_last else None, return_outputs=False)
        self._running = None
        return step.sums

    def _feed(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self._running is not None, "a stage of a pipeline runs inside of run()"
        return args, {"inputs": self._running.inputs[int(kwargs["number"])]}

    def _loss(self, output: tuple[Tensor, ...], target: Tensor) -> Tensor:
        assert self._running is not None, "a pipeline's loss is taken inside of run()"
        objective, losses = self._running.objective, LossSums(*output)
        self._running.sums += objective.terms(losses).detach()
        return objective(losses)

    def _schedule(self, count: int, B: int, T: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        """The schedule for `count` micro-batches of this shape, with its buffers; made once."""
        key = (count, B, T)
        if key not in self._schedules:
            self._schedules.clear()  # a stage of another shape has ended: its buffers are not needed again
            self._schedules[key] = self._build(*key)
        return self._schedules[key]

    def _build(self, count: int, B: int, T: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        stages = [
            PipelineStage(
                part,
                number,
                self._stages,
                next(part.parameters()).device,
                input_args=() if part.part.first else self._carried(part, B, T),
                output_args=_losses(part) if part.part.last else self._carried(part, B, T),
                group=self._group,
                dw_builder=_no_second_pass if len(part.mtp) > 1 else None,
            )
            for number, part in sorted(self._parts.items())
        ]
        chosen = SCHEDULES[self._config.schedule]
        if chosen is Schedule1F1B and count < self._stages:
            chosen = ScheduleGPipe  # with so few there is nothing to alternate, and torch's 1F1B refuses them
        one_a_rank = issubclass(chosen, PipelineScheduleSingle)
        return chosen(stages[0] if one_a_rank else stages, count, loss_fn=self._loss, scale_grads=False)  # pyright: ignore

    def _carried(self, part: Transformer, B: int, T: int) -> tuple[Tensor, ...]:
        """What passes between stages, on the meta device: shapes and types only."""
        hidden = torch.empty(B, T // self._tp, part.config.hidden_size, dtype=self._activations, device="meta")
        return hidden.requires_grad_(), torch.empty((), device="meta").requires_grad_()


def _losses(part: Transformer) -> tuple[Tensor, ...]:
    """What the last stage yields, likewise: `LossSums` as a tuple."""
    return tuple(torch.empty(shape, device="meta").requires_grad_() for shape in ((), (len(part.mtp),), ()))


def _no_second_pass() -> Callable[[], None]:
    """For a stage whose weights get their gradients along with its input, where a zero-bubble schedule would have them later.

    Chained MTP heads reach the one embedding on several ways, one behind the other; torch's later pass for weights alone would go
    back through layers whose graph is freed by then."""
    return lambda: None
