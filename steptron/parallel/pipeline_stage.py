"""A pipeline stage whose gradients are reduced while the backward pass of its last micro-batch runs.

    micro-batches but the last ─► gradients summed on each rank, in fp32
    the last one               ─► layer N: gradients complete ─► reduced, while layer N − 1 computes ─► …

torch's own stage reduces everything after that pass, and waits for it before it goes on with another stage. The sums
are the same in both, number by number: over micro-batches first, then over ranks.

A schedule may compute the gradients of inputs first and those of weights later. Then the reduction of a unit (see
`fsdp.py`) begins in the later pass.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage

from steptron.model.transformer import Transformer
from steptron.torch_internals import backward_of_weights, reduce_unit


class Stage(PipelineStage):
    """A stage of a pipeline on this rank."""

    def __init__(
        self,
        part: Transformer,
        number: int,
        num_stages: int,
        device: torch.device,
        input_args: tuple[Tensor, ...],
        output_args: tuple[Tensor, ...],
        group: ProcessGroup,
        in_one_pass: bool,
    ) -> None:
        """Make the stage `number`.

        `input_args` and `output_args` have the shapes and dtypes of what the stage receives and sends.
        `in_one_pass`: weight gradients are always computed together with input gradients.
        """
        super().__init__(
            part,
            number,
            num_stages,
            device,
            input_args=input_args,
            output_args=output_args,
            group=group,
            dw_builder=_no_second_pass if in_one_pass else None,
        )
        self.in_one_pass = in_one_pass or self.is_first
        """True if a pass computes weight gradients and input gradients: a first stage has no inputs with gradients."""
        assert isinstance(part, FSDPModule), "a part of a pipeline is sharded"
        self._root = part

    def watch_last(self, outputs: Iterable[Tensor]) -> None:
        """Begin to reduce gradients as soon as a backward pass from these outputs begins.

        They are those of the last micro-batch. `outputs` may not be those of a pass for inputs alone.
        """
        for output in outputs:
            if output.requires_grad:
                output.register_hook(self._reduce_from_now_on)

    def _reduce_from_now_on(self, gradient: Tensor) -> None:
        """Let FSDP2 reduce each unit when the gradient of its input is there, and at the end what is left."""
        self._root.set_requires_gradient_sync(True)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Compute the weight gradients of a micro-batch whose input gradients are there already.

        In the last one, start to reduce the gradients of each unit as soon as they are complete.
        """
        if not last_backward or self.in_one_pass:
            return super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        _, groups, _, _ = self.backward_state.pop(bwd_chunk_id)
        # Autograd runs once for each group of weights, and FSDP2 would reduce all that there is at the end of each.
        self._root.set_requires_gradient_sync(False)
        for unit in backward_of_weights(groups, _units_of_weights(self._root)):
            unit.set_requires_gradient_sync(True, recurse=False)
            reduce_unit(unit)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Do nothing after the last backward pass: torch would wait here, but other stages of the rank go on."""
        assert grad_scale_factor == 1, "the objective has divided the gradients already"

    def finish(self) -> None:
        """Wait for all gradients, and free the gathered parameters. Call this after the last micro-batch."""
        super().perform_reduce_grad(1)


def _units_of_weights(part: FSDPModule) -> dict[nn.Parameter, FSDPModule]:
    """Return the unit of each gathered parameter: the innermost module around it that is one."""
    assert isinstance(part, nn.Module), "FSDP2 changes the class of a module"
    units = {name: module for name, module in part.named_modules() if isinstance(module, FSDPModule)}

    def innermost(name: str) -> FSDPModule:
        return units[name] if name in units else innermost(name.rpartition(".")[0])

    return {weight: innermost(name.rpartition(".")[0]) for name, weight in part.named_parameters()}


def _no_second_pass() -> Callable[[], None]:
    """Compute weight gradients together with input gradients, where a zero-bubble schedule would compute them later.

    Chained MTP heads reach the one embedding by several paths, one behind the other. torch's later pass for weights
    would go back through layers whose graph is already freed. And a sublayer that is recomputed in backward would be
    recomputed twice.
    """
    return lambda: None
