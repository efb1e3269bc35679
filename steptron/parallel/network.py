"""A rank's share of the network: its stages of the pipeline (the whole network where there is none), and how they are run.

What is the same for any layout goes through here: parameters by name, the switch to a stage, a step's forward and backward passes.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from steptron.config.schema import ModelConfig, StageConfig
from steptron.model.heads import Reading, log_probs, logits
from steptron.model.inputs import Inputs
from steptron.model.transformer import Outputs, Transformer, apply_stage
from steptron.moe.layer import MoeLayer
from steptron.parallel.objective import Objective
from steptron.parallel.tied_embedding import TiedEmbedding


class Runner(Protocol):
    """Takes micro-batches through the parts of a network. All ranks call it together."""

    def train(self, inputs: list[Inputs], objective: Objective) -> Tensor:
        """Run forward and backward passes. Return this rank's sums of the loss terms (see `Objective`)."""
        ...

    def read(self, inputs: list[Inputs], reading: Reading) -> list[Tensor]:
        """Run forward passes. Return what is read of each micro-batch, on every rank of a pipeline."""
        ...


class Network:
    """`parts`: stages by number · `runner`: the way through them · `tie`: between the embedding's copies, where there are two ·
    `kept`: parameters by name as they are between steps, where those are not the modules' own."""

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
        """Where its parameters are."""
        return next(next(iter(self.parts.values())).parameters()).device

    @property
    def config(self) -> ModelConfig:
        """Of the whole network."""
        return next(iter(self.parts.values())).config

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters by their names in the whole network; a copy of the embedding is not among them."""
        if self._kept is not None:
            yield from self._kept.items()
            return
        for part in self.parts.values():
            for name, parameter in part.named_parameters():
                if part.part.first or name != "embedding.weight":
                    yield name, parameter

    def state(self) -> dict[str, Tensor]:
        """Parameters and router biases: what a checkpoint keeps, and loads in place."""
        return dict(self.named_parameters()) | self.buffers()

    def buffers(self) -> dict[str, Tensor]:
        """Router biases by name."""
        return {name: buffer for part in self.parts.values() for name, buffer in part.named_buffers()}

    def moe_layers(self) -> dict[int, MoeLayer]:
        """The mixture-of-experts layers that are here, by global index."""
        return {n: moe for part in self.parts.values() for n, moe in part.moe_layers().items()}

    def apply_stage(self, stage: StageConfig, num_groups: int) -> None:
        """Switch to a stage of the curriculum; see `model.transformer.apply_stage`."""
        for part in self.parts.values():
            apply_stage(part, stage, num_groups)

    def forward_backward(self, inputs: list[Inputs], objective: Objective) -> Tensor:
        """Run all micro-batches of a step: gradients, reduced over the data-parallel ranks; return this rank's sums of the loss terms."""
        sums = self._runner.train(inputs, objective)
        if self._tie is not None:
            self._tie.add_gradient()
        return sums

    def log_probs(self, inputs: list[Inputs]) -> list[Tensor]:
        """Return, for each micro-batch, log p of the token after each position that is here, fp32 [B, T], without gradient.

        Nothing that a training step sees is changed, and nothing is recorded. All ranks call it together."""
        return self._read(inputs, log_probs)

    def logits(self, inputs: list[Inputs]) -> list[Tensor]:
        """Return, for each micro-batch, the logits of the token after each position that is here, fp32 [B, T, V]; likewise."""
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
        """To be called when parameters have new values: by the optimizer, or from a checkpoint."""
        if self._tie is not None:
            self._tie.copy_values()


def _reshard(part: Transformer) -> None:
    """Free what a forward pass has left gathered: the next one would not see new values."""
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class InTurn:
    """Takes micro-batches one after the other through a network that is whole."""

    def __init__(self, model: Transformer) -> None:
        self._model = model

    def train(self, inputs: list[Inputs], objective: Objective) -> Tensor:
        """See `Runner`."""
        sums = objective.zeros()
        for micro_batch in inputs:
            total, terms = objective(self._model, final_outputs(self._model(inputs=micro_batch)), micro_batch)
            total.backward()
            sums += terms
        return sums

    def read(self, inputs: list[Inputs], reading: Reading) -> list[Tensor]:
        """See `Runner`."""
        return [reading(self._model, final_outputs(self._model(inputs=i)), i) for i in inputs]


def final_outputs(outputs: object) -> Outputs:
    """Return what a whole network has yielded, as what it is."""
    assert isinstance(outputs, Outputs), "a whole network yields its final hidden states"
    return outputs
