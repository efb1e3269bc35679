"""`Network`, one interface to a rank's part of the model in every layout: training passes, log-probs and logits.

It has the interface that is the same for every layout: parameters by name, the switch to a stage of the curriculum, the
forward and backward passes of a step.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from steptron.config.schema import ModelConfig, StageConfig
from steptron.model.heads import Reading, head_log_probs, log_probs, logits, predictions
from steptron.model.inputs import Inputs
from steptron.model.transformer import Outputs, Transformer, apply_stage
from steptron.moe.layer import MoeLayer
from steptron.parallel.objective import Objective
from steptron.parallel.tied_embedding import TiedEmbedding


class Runner(Protocol):
    """Runs micro-batches through the parts of a network. All ranks call it together."""

    def train(self, inputs: list[Inputs], objective: Objective) -> Tensor:
        """Run forward and backward passes. Return this rank's sums of the loss terms (see `Objective`)."""
        ...

    def read(self, inputs: list[Inputs], reading: Reading) -> list[Tensor]:
        """Run forward passes. Return the reading of each micro-batch, on every rank of a pipeline."""
        ...


class Network:
    """A rank's part of the network.

    `parts` are its pipeline stages by number, `runner` runs them, and `tie` connects the copies of the embedding, if
    there are several. `kept` are the parameters by name between steps, if these are not the modules' own.
    """

    def __init__(
        self,
        parts: dict[int, Transformer],
        runner: Runner,
        tie: TiedEmbedding | None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.parts, self._runner, self._tie, self._kept = parts, runner, tie, kept
        self.values_changed()

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(next(iter(self.parts.values())).parameters()).device

    @property
    def config(self) -> ModelConfig:
        """The configuration of the complete network."""
        return next(iter(self.parts.values())).config

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters by their names in the complete network; later copies of the embedding are left out."""
        if self._kept is not None:
            yield from self._kept.items()
            return
        for part in self.parts.values():
            for name, parameter in part.named_parameters():
                if part.part.first or name != "embedding.weight":
                    yield name, parameter

    def state(self) -> dict[str, Tensor]:
        """Return parameters and router biases by name: what a checkpoint saves, and loads in place."""
        return dict(self.named_parameters()) | self.buffers()

    def buffers(self) -> dict[str, Tensor]:
        """Return the router biases by name."""
        return {name: buffer for part in self.parts.values() for name, buffer in part.named_buffers()}

    def moe_layers(self) -> dict[int, MoeLayer]:
        """Return the mixture-of-experts layers of this rank by global index."""
        return {n: moe for part in self.parts.values() for n, moe in part.moe_layers().items()}

    def apply_stage(self, stage: StageConfig, num_groups: int) -> None:
        """Switch to a stage of the curriculum; see `model.transformer.apply_stage`."""
        for part in self.parts.values():
            apply_stage(part, stage, num_groups)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Let the expert-parallel exchange take exact sizes, whatever its capacity is."""
        layers = list(self.moe_layers().values())
        capacities = [moe.capacity for moe in layers]
        for moe in layers:
            moe.capacity = None
        try:
            yield
        finally:
            for moe, capacity in zip(layers, capacities, strict=True):
                moe.capacity = capacity

    def forward_backward(self, inputs: list[Inputs], objective: Objective) -> Tensor:
        """Run forward and backward of all micro-batches of a step. Return this rank's sums of the loss terms.

        Gradients are reduced over the data-parallel ranks: in each backward pass, or in the last one of a pipeline.
        """
        sums = self._runner.train(inputs, objective)
        if self._tie is not None:
            self._tie.add_gradients(trained=len(inputs[0].tokens_HBT) - 1)
        return sums

    def log_probs(self, inputs: list[Inputs]) -> list[Tensor]:
        """Return, for each micro-batch, log p of the token after each of this rank's positions, fp32 [B, T].

        There is no gradient. Nothing that affects training changes, and nothing is recorded. All ranks call this
        together.
        """
        return self._read(inputs, log_probs)

    def head_log_probs(self, inputs: list[Inputs]) -> list[Tensor]:
        """Return, for each micro-batch, log p of each head's target at each of this rank's positions, fp32 [H, B, T].

        As with `log_probs`, there is no gradient, and all ranks call this together.
        """
        return self._read(inputs, head_log_probs)

    def predictions(self, inputs: list[Inputs]) -> list[Tensor]:
        """Return, for each micro-batch, log p of the token after each position and the most probable one [2, B, T].

        Both are fp32. As with `log_probs`, there is no gradient, and all ranks call this together.
        """
        return self._read(inputs, predictions)

    def logits(self, inputs: list[Inputs]) -> list[Tensor]:
        """Return, for each micro-batch, the logits of the token after each of this rank's positions, fp32 [B, T, V].

        As with `log_probs`, there is no gradient, and all ranks call this together.
        """
        return self._read(inputs, logits)

    @torch.no_grad()
    def _read(self, inputs: list[Inputs], reading: Reading) -> list[Tensor]:
        for part in self.parts.values():
            part.eval()  # router counts and statistics are those of training
        try:
            return self._runner.read([micro_batch.to(self.device) for micro_batch in inputs], reading)
        finally:
            for part in self.parts.values():
                part.train()
                _reshard(part)

    def values_changed(self) -> None:
        """Call this when parameters have new values, from the optimizer or from a checkpoint."""
        if self._tie is not None:
            self._tie.copy_values()


def _reshard(part: Transformer) -> None:
    """Free parameters that a forward pass has left gathered: the next pass would not see new values."""
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class InTurn:
    """Runs micro-batches one after the other through a network without a pipeline."""

    def __init__(self, model: Transformer) -> None:
        self._model = model

    def train(self, inputs: list[Inputs], objective: Objective) -> Tensor:
        """Implement `Runner.train`."""
        sums = objective.zeros()
        for micro_batch in inputs:
            total, terms = objective(self._model, final_outputs(self._model(inputs=micro_batch)), micro_batch)
            total.backward()
            sums += terms
        return sums

    def read(self, inputs: list[Inputs], reading: Reading) -> list[Tensor]:
        """Implement `Runner.read`."""
        return [reading(self._model, final_outputs(self._model(inputs=i)), i) for i in inputs]


def final_outputs(outputs: object) -> Outputs:
    """Return the output of a complete network, checked to be `Outputs`."""
    assert isinstance(outputs, Outputs), "a network without a pipeline returns its final hidden states"
    return outputs
