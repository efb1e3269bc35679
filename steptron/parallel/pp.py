"""Pipeline parallel: run a rank's stages, by torch's schedules in training and in plain order for readings.

    micro-batches ─► [stage 0] ─ hidden states, balance loss so far ─► [stage 1] ─► … ─► [last] ─► outputs ─► loss
                               ◄─ their gradients ─

Every rank reads the micro-batches itself, and gives its stages their inputs (tokens, borders, positions) by number.
Only hidden states [B, T, D] and the balance loss travel between stages. The loss of the last stage is the complete
objective: the balance losses of earlier stages travel to it, and their gradients return on the same path.

A forward pass alone needs no schedule. Each rank runs the micro-batches through its stages in order, receiving before
and sending after each stage, and the rank of the last stage broadcasts the result. The number and shapes of these
micro-batches are free, and the buffers of the schedule are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
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
from steptron.model.heads import Reading
from steptron.model.inputs import Inputs
from steptron.model.transformer import Outputs, Transformer
from steptron.parallel.objective import Objective

SCHEDULES = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zb-v": ScheduleZBVZeroBubble,
    "dualpipe-v": ScheduleDualPipeV,
}


@dataclass(kw_only=True)
class _Step:
    """The values that the stages' hooks and the loss need while a step runs."""

    inputs: list[Inputs]
    objective: Objective
    sums: Tensor


class Pipeline:
    """Runs the micro-batches of a step through this rank's stages."""

    def __init__(
        self,
        parts: dict[int, Transformer],
        config: PipelineConfig,
        owners: list[int],
        group: ProcessGroup,
        activations: torch.dtype,
        tp: int,
        recomputes: bool,
    ) -> None:
        """Prepare this rank's stages.

        `parts` are the stages by number, and `owners` the group's rank of each stage. `activations` is the dtype of
        hidden states, and `tp` the number of slices of a sequence. `recomputes` is True if complete sublayers are
        recomputed in backward.
        """
        self._parts, self._config, self._owners, self._group = dict(sorted(parts.items())), config, owners, group
        self._activations, self._tp, self._in_one_pass = activations, tp, recomputes
        self._schedules: dict[tuple[int, int, int], PipelineScheduleSingle | PipelineScheduleMulti] = {}
        self._running: _Step | None = None
        self._last = next((part for part in parts.values() if part.part.last), None)
        for part in parts.values():
            part.register_forward_pre_hook(self._feed, with_kwargs=True, prepend=True)
            part.register_forward_hook(_flatten)

    def train(self, inputs: list[Inputs], objective: Objective) -> Tensor:
        """Implement `Runner.train`; the sums are zeros unless this rank has the last stage."""
        _, B, T = inputs[0].tokens_HBT.shape
        self._running = step = _Step(inputs=inputs, objective=objective, sums=objective.zeros())
        schedule = self._schedule(len(inputs), B, T)
        number = torch.arange(len(inputs))
        try:
            schedule.step(number=number, target=None if self._last is None else number, return_outputs=False)
        finally:
            self._running = None
        return step.sums

    def read(self, inputs: list[Inputs], reading: Reading) -> list[Tensor]:
        """Implement `Runner.read`."""
        found = [self._read_one(micro_batch, reading) for micro_batch in inputs]
        return [self._from_last(value) for value in found]

    def _read_one(self, inputs: Inputs, reading: Reading) -> Tensor | None:
        """Run a micro-batch through this rank's stages. Return the reading if the last stage is here, else None."""
        here, passed = self._group.rank(), ()
        for stage, part in self._parts.items():
            if not part.part.first and self._owners[stage - 1] != here:
                passed = self._receive(part, inputs, self._owners[stage - 1])
            passed = part(*passed, inputs=inputs)
            if part.part.last:
                return reading(part, _outputs(passed), inputs)
            if self._owners[stage + 1] != here:
                for value in passed:
                    dist.send(value.contiguous(), group=self._group, group_dst=self._owners[stage + 1])
        return None

    def _receive(self, part: Transformer, inputs: Inputs, source: int) -> tuple[Tensor, ...]:
        _, B, T = inputs.tokens_HBT.shape
        buffers = tuple(torch.empty_like(like, device=inputs.tokens_HBT.device) for like in self._carried(part, B, T))
        for buffer in buffers:
            dist.recv(buffer, group=self._group, group_src=source)
        return buffers

    def _from_last(self, value: Tensor | None) -> Tensor:
        """Broadcast the value of the rank with the last stage to all ranks of the pipeline."""
        form = [None if value is None else (value.shape, value.dtype)]
        source = dist.get_global_rank(self._group, self._owners[-1])
        dist.broadcast_object_list(form, source, group=self._group)
        if value is None:
            assert form[0] is not None, "the rank of the last stage has a value"
            shape, dtype = form[0]
            value = torch.empty(shape, dtype=dtype, device=next(next(iter(self._parts.values())).parameters()).device)
        dist.broadcast(value, source, group=self._group)
        return value

    def _feed(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace the number of a micro-batch, which is what a schedule splits, by its inputs."""
        if self._running is None:
            return args, kwargs
        return args, {"inputs": self._running.inputs[int(kwargs["number"])]}

    def _loss(self, output: tuple[Tensor, ...], target: Tensor) -> Tensor:
        step = self._running
        assert step is not None, "the loss of a pipeline is computed only within train()"
        assert self._last is not None, "the loss of a pipeline is computed on the rank of the last stage"
        total, terms = step.objective(self._last, _outputs(output), step.inputs[int(target)])
        step.sums += terms
        return total

    def _schedule(self, count: int, B: int, T: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        """Return the schedule for `count` micro-batches of this shape, with its buffers; it is made once per shape."""
        key = (count, B, T)
        if key not in self._schedules:
            self._schedules.clear()  # a training stage of another shape has ended: its buffers are not needed again
            self._schedules[key] = self._build(*key)
        return self._schedules[key]

    def _build(self, count: int, B: int, T: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        stages = [
            PipelineStage(
                part,
                number,
                len(self._owners),
                next(part.parameters()).device,
                input_args=() if part.part.first else self._carried(part, B, T),
                output_args=self._finished(part, B, T) if part.part.last else self._carried(part, B, T),
                group=self._group,
                dw_builder=_no_second_pass if self._in_one_pass or len(part.mtp) > 1 else None,
            )
            for number, part in self._parts.items()
        ]
        chosen = SCHEDULES[self._config.schedule]
        if chosen is Schedule1F1B and count < len(self._owners):
            chosen = ScheduleGPipe  # with so few there is nothing to alternate, and torch's 1F1B refuses them
        one_a_rank = issubclass(chosen, PipelineScheduleSingle)
        return chosen(stages[0] if one_a_rank else stages, count, loss_fn=self._loss, scale_grads=False)  # pyright: ignore

    def _carried(self, part: Transformer, B: int, T: int) -> tuple[Tensor, ...]:
        """Return the tensors that travel between stages, on the meta device: only shapes and dtypes count."""
        hidden = torch.empty(B, T // self._tp, part.config.hidden_size, dtype=self._activations, device="meta")
        return hidden.requires_grad_(), torch.empty((), device="meta").requires_grad_()

    def _finished(self, part: Transformer, B: int, T: int) -> tuple[Tensor, ...]:
        """Return the last stage's `Outputs` as a flat tuple on the meta device: only shapes and dtypes count."""
        hidden, balance = self._carried(part, B, T)
        return hidden, balance, *(torch.empty_like(hidden).requires_grad_() for _ in part.mtp)


def _flatten(module: nn.Module, args: Any, output: Any) -> tuple[Tensor, ...]:
    """Return the output of a stage as a tuple of tensors, which torch's schedules need. A forward hook."""
    return (*output[:2], *output.mtp_BTD) if isinstance(output, Outputs) else tuple(output)


def _outputs(flat: tuple[Tensor, ...]) -> Outputs:
    """Return the `Outputs` of the last stage from the tuple of `_flatten`."""
    return Outputs(flat[0], flat[1], flat[2:])


def _no_second_pass() -> Callable[[], None]:
    """Compute weight gradients together with input gradients, where a zero-bubble schedule would compute them later.

    Chained MTP heads reach the one embedding by several paths, one behind the other. torch's later pass for weights
    would go back through layers whose graph is already freed. And a sublayer that is recomputed in backward would be
    recomputed twice.
    """
    return lambda: None
