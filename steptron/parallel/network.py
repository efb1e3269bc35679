"""A rank's share of the network: its stages of the pipeline (the whole network where there is none), and how they are run.

What is the same for any layout goes through here: parameters by name, the switch to a stage, a step's forward and backward passes.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from steptron.config.schema import ModelConfig, StageConfig
from steptron.model.inputs import Inputs
from steptron.model.transformer import LossSums, Transformer, apply_stage
from steptron.moe.layer import MoeLayer
from steptron.parallel.objective import Objective
from steptron.parallel.tie import EmbeddingTie

Run = Callable[[list[Inputs], Objective], Tensor]
"""Forward and backward passes of micro-batches → this rank's sums of the loss terms (see `Objective.terms`)."""


class Network:
    """`parts`: stages by number · `run`: the way through them · `tie`: between the embedding's copies, where there are two ·
    `kept`: parameters by name as they are between steps, where those are not the modules' own."""

    def __init__(
        self,
        parts: dict[int, Transformer],
        run: Run,
        tie: EmbeddingTie | None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.parts, self._run, self._tie, self._kept = parts, run, tie, kept
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
        """All micro-batches of a step: gradients, reduced over the data-parallel ranks; this rank's sums of the loss terms."""
        sums = self._run(inputs, objective)
        if self._tie is not None:
            self._tie.add_gradient()
        return sums

    def values_changed(self) -> None:
        """To be called when parameters have new values: by the optimizer, or from a checkpoint."""
        if self._tie is not None:
            self._tie.copy_values()


def in_turn(model: Transformer) -> Run:
    """Micro-batches one after the other through a network that is whole."""

    def run(inputs: list[Inputs], objective: Objective) -> Tensor:
        sums = objective.zeros()
        for micro_batch in inputs:
            losses = model(inputs=micro_batch)
            assert isinstance(losses, LossSums), "a whole network ends with its losses"
            objective(losses).backward()
            sums += objective.terms(losses).detach()
        return sums

    return run
