"""Pipeline parallel: run a rank's stages, by torch's schedules in training and in plain order for readings.

    micro-batches ─► [stage 0] ─ hidden states, losses so far ─► [stage 1] ─► … ─► [last] ─► objective
                               ◄─ their gradients ─

Every rank reads the micro-batches itself, and gives its stages their inputs (tokens, borders, positions) by number.
Only hidden states [B, T, D] and the sums of losses [H + 1] travel between stages: one state, or behind the first block
of an MTP head those that later blocks and output matrices read. A stage with an output matrix adds its loss to the
sums. The last stage makes the objective of them, and its gradients return on the same path.

`dualpipe-v` pairs a forward pass with the backward pass of another micro-batch on the rank's other stage. They take
turns: where one would wait for tokens on their way to experts or back, the other computes (`turns.py`). Gradients are
reduced while the last micro-batch is on its way back (`pipeline_stage.py`).

A forward pass alone needs no schedule. Each rank runs the micro-batches through its stages in order, receiving before
and sending after each stage, and the rank of an output matrix broadcasts its result. The number and shapes of these
micro-batches are free, and the buffers of the schedule are kept.

Legend: B rows, T tokens, D hidden, H heads (output and MTP).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    OVERLAP_F_B,
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from steptron.config.schema import PipelineConfig
from steptron.model.heads import LossSums, Reading
from steptron.model.inputs import Inputs
from steptron.model.parts import Part
from steptron.model.transformer import Outputs, Transformer
from steptron.parallel.objective import Objective
from steptron.parallel.pipeline_stage import Stage
from steptron.parallel.turns import Turns
from steptron.torch_internals import pair_of_passes

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
    reduced_early: dict[nn.Module, Stage]
    """See `_Prepared`."""


class _Prepared(NamedTuple):
    """The stages of this rank and their schedule, for micro-batches of one number and shape."""

    stages: list[Stage]
    schedule: PipelineScheduleSingle | PipelineScheduleMulti

    reduced_early: dict[nn.Module, Stage]
    """The stages, by part, that compute weight gradients of the last micro-batch together with input gradients."""


class Pipeline:
    """Runs the micro-batches of a step through this rank's stages."""

    def __init__(
        self,
        parts: dict[int, Transformer],
        cuts: list[Part],
        config: PipelineConfig,
        owners: list[int],
        group: ProcessGroup,
        activations: torch.dtype,
        tp: int,
        recomputes: bool,
        turns: Turns,
    ) -> None:
        """Prepare this rank's stages.

        `parts` are this rank's stages by number, `cuts` are all stages, and `owners` the group's rank of each.
        `activations` is the dtype of hidden states, and `tp` the number of slices of a sequence. `recomputes` is True
        if complete sublayers are recomputed in backward. `turns` are those that the dispatchers of the parts give.
        """
        self._parts, self._config, self._owners, self._group = dict(sorted(parts.items())), config, owners, group
        self._activations, self._tp, self._in_one_pass, self._turns = activations, tp, recomputes, turns
        self._heads_at = {head: owner for part, owner in zip(cuts, owners, strict=True) for head in part.outputs}
        self._prepared: dict[tuple[int, int, int, int], _Prepared] = {}
        self._running: _Step | None = None
        self._has_last = any(part.part.last for part in parts.values())
        for part in parts.values():
            _gather_heads(part)
            part.register_forward_pre_hook(self._feed, with_kwargs=True, prepend=True)
            part.register_forward_hook(self._add_losses, with_kwargs=True)

    def train(self, inputs: list[Inputs], objective: Objective) -> Tensor:
        """Implement `Runner.train`; the sums are zeros unless this rank has the last stage."""
        H, B, T = inputs[0].tokens_HBT.shape
        stages, schedule, early = self._schedule(len(inputs), H, B, T)
        self._running = step = _Step(inputs=inputs, objective=objective, sums=objective.zeros(), reduced_early=early)
        number = torch.arange(len(inputs))
        try:
            schedule.step(number=number, target=number if self._has_last else None, return_outputs=False)
        except RuntimeError as error:
            wrapped = error
        else:
            for stage in stages:
                stage.finish()
            return step.sums
        finally:
            self._running = None
        raise _own_error(wrapped)

    def read(self, inputs: list[Inputs], reading: Reading) -> list[Tensor]:
        """Implement `Runner.read`."""
        found = [self._read_one(micro_batch, reading) for micro_batch in inputs]
        return [
            reading.joined({head: self._from_owner(values.get(head), head) for head in reading.heads(micro_batch)})
            for micro_batch, values in zip(inputs, found, strict=True)
        ]

    def _read_one(self, inputs: Inputs, reading: Reading) -> dict[int, Tensor]:
        """Run a micro-batch through this rank's stages. Return the reading of the heads that are here."""
        here, passed, found = self._group.rank(), (), {}
        for stage, part in self._parts.items():
            if not part.part.first and self._owners[stage - 1] != here:
                passed = self._receive(part, inputs, self._owners[stage - 1])
            *states, sums = passed or (None,)
            outputs = part(*states, sums=sums, inputs=inputs)
            found |= reading.here(part, outputs, inputs)
            passed = (*outputs.states, outputs.sums)
            if not part.part.last and self._owners[stage + 1] != here:
                for value in passed:
                    dist.send(value.contiguous(), group=self._group, group_dst=self._owners[stage + 1])
        return found

    def _receive(self, part: Transformer, inputs: Inputs, source: int) -> tuple[Tensor, ...]:
        H, B, T = inputs.tokens_HBT.shape
        likes = self._carried(part, part.part.received(H - 1), H, B, T)
        buffers = tuple(torch.empty_like(like, device=inputs.tokens_HBT.device) for like in likes)
        for buffer in buffers:
            dist.recv(buffer, group=self._group, group_src=source)
        return buffers

    def _from_owner(self, value: Tensor | None, head: int) -> Tensor:
        """Broadcast the value of the rank with a head's output matrix to all ranks of the pipeline."""
        form = [None if value is None else (value.shape, value.dtype)]
        source = dist.get_global_rank(self._group, self._heads_at[head])
        dist.broadcast_object_list(form, source, group=self._group)
        if value is None:
            assert form[0] is not None, "the rank of the output matrix has a value"
            shape, dtype = form[0]
            value = torch.empty(shape, dtype=dtype, device=next(next(iter(self._parts.values())).parameters()).device)
        dist.broadcast(value, source, group=self._group)
        return value

    def _feed(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace the number of a micro-batch, which is what a schedule splits, by its inputs.

        A forward pre-hook of a part, which turns what a schedule passes into the arguments of `Transformer.forward`.
        """
        if self._running is None:
            return args, kwargs
        *states, sums = args or (None,)
        return tuple(states), {"sums": sums, "inputs": self._running.inputs[int(kwargs["number"])]}

    def _add_losses(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Outputs
    ) -> tuple[Tensor, ...] | None:
        """Return what a schedule sends to the next stage: the states, and the losses with those of this part.

        A forward hook of a part. It does nothing outside of `train`.
        """
        if self._running is None:
            return None
        assert isinstance(module, Transformer), "the hook is on the parts"
        step, inputs = self._running, kwargs["inputs"]
        sums = step.objective.loss(module, outputs, inputs)
        sent = *outputs.states, torch.cat([sums.heads_H, sums.balance[None]])
        if inputs is step.inputs[-1] and module in step.reduced_early:
            step.reduced_early[module].watch_last(sent)
        return sent

    def _loss(self, output: tuple[Tensor, ...], target: Tensor) -> Tensor:
        step = self._running
        assert step is not None, "the loss of a pipeline is computed only within train()"
        (sums,) = output
        total, terms = step.objective.total(LossSums(sums[:-1], sums[-1]))
        step.sums += terms
        return total

    def _schedule(self, count: int, H: int, B: int, T: int) -> _Prepared:
        """Return the stages and the schedule for `count` micro-batches of this shape, made once per shape."""
        key = (count, H, B, T)
        if key not in self._prepared:
            self._prepared.clear()  # a training stage of another shape has ended: its buffers are not needed again
            self._prepared[key] = self._build(*key)
        return self._prepared[key]

    def _build(self, count: int, H: int, B: int, T: int) -> _Prepared:
        stages = [
            Stage(
                part,
                number,
                len(self._owners),
                next(part.parameters()).device,
                input_args=() if part.part.first else self._carried(part, part.part.received(H - 1), H, B, T),
                output_args=self._carried(part, part.part.sent(H - 1), H, B, T),
                group=self._group,
                in_one_pass=self._in_one_pass or len(part.part.blocks) > 1,
            )
            for number, part in self._parts.items()
        ]
        chosen = SCHEDULES[self._config.schedule]
        if chosen is Schedule1F1B and count < len(self._owners):
            chosen = ScheduleGPipe  # with so few there is nothing to alternate, and torch's 1F1B refuses them
        one_a_rank = issubclass(chosen, PipelineScheduleSingle)
        schedule = chosen(stages[0] if one_a_rank else stages, count, loss_fn=self._loss, scale_grads=False)  # pyright: ignore
        if isinstance(schedule, ScheduleDualPipeV):
            schedule.register_custom_function(OVERLAP_F_B, self._run_pair)
        split = _split_last(schedule, self._group.rank(), last=count - 1)
        early = {stage.submod: stage for stage in stages if stage.in_one_pass or stage.stage_index not in split}
        return _Prepared(stages, schedule, early)

    def _run_pair(self, action: Any, ctx: Any) -> None:
        """Run a forward and a backward pass that the schedule pairs, in turns."""
        self._turns.run(*pair_of_passes(action, ctx))

    def _carried(self, part: Transformer, heads: tuple[int, ...], H: int, B: int, T: int) -> tuple[Tensor, ...]:
        """Return tensors like those that travel between stages, on the meta device: only shapes and dtypes count.

        `heads` are the heads whose states travel.
        """
        shape = B, T // self._tp, part.config.hidden_size
        states = (torch.empty(shape, dtype=self._activations, device="meta").requires_grad_() for _ in heads)
        return *states, torch.empty(H + 1, device="meta").requires_grad_()


def _gather_heads(part: Transformer) -> None:
    """Gather the parameters of MTP heads once, and free them.

    A stage of the curriculum may leave heads out. At the end of a backward pass in a pipeline, FSDP2 asks all units for
    their gathered parameters, which those have only after a first time.
    """
    for module in part.mtp.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def _split_last(schedule: PipelineScheduleSingle | PipelineScheduleMulti, rank: int, last: int) -> set[int]:
    """Return the stages that have a pass for the inputs alone of micro-batch `last`, and another one for weights."""
    if isinstance(schedule, PipelineScheduleSingle):
        return set()
    actions = [action for action in schedule.pipeline_order[rank] if action is not None]
    last_ones = [action for action in actions if action.microbatch_index == last]
    return {action.stage_index for action in last_ones if action.computation_type == BACKWARD_INPUT}


def _own_error(error: BaseException) -> BaseException:
    """Return the error of a stage, which torch wraps in a text about the stage's inputs."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error
