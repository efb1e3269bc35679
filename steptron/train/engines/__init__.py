"""What a step is made with: shards parameters, sums gradients, moves weights. The step, the loop and the metrics know no more of it.

    forward_backward ─► gradients, summed over ranks ─► gradient_squares ─► (the judge) ─► update
    state ─► checkpoint          checkpoint ─► load

    native.py      torch's FSDP2, Muon and AdamW; every layout
    deepspeed.py   DeepSpeed's ZeRO 1, 2, 3 and AdamW; data and expert parallel layouts; imported only where a recipe asks for it
    stretches.py   where ZeRO has put a parameter's elements, and the way from there to the shards of a checkpoint and back

Both give tensors of the same names and shapes to a checkpoint: a run saved under one goes on under the other.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from steptron.config.schema import Recipe
from steptron.errors import RecipeError
from steptron.model.inputs import Inputs
from steptron.optim.observe import UpdateObserver
from steptron.parallel.mesh import Meshes
from steptron.parallel.network import Network
from steptron.parallel.objective import Objective
from steptron.train.engines.native import NativeEngine

Read = Callable[[dict[str, Tensor]], None]
"""Fills tensors, by their names in a checkpoint, in place."""


class Engine(Protocol):
    """One a rank; all ranks call it together."""

    network: Network
    """This rank's share of the model."""

    def observe(self, observer: UpdateObserver | None) -> None:
        """Have every update shown to `observer`."""
        ...

    def forward_backward(self, inputs: list[Inputs], objective: Objective) -> Tensor:
        """Gradients of all micro-batches of a step, those of an earlier one dropped; this rank's sums of the loss terms."""
        ...

    def gradient_squares(self) -> Tensor:
        """Σ g² of this rank's part of each parameter, float64 [P] in the network's order; over all ranks every element counts once."""
        ...

    def update(self, norm: Tensor, max_norm: float, lr: float) -> None:
        """Clip the gradient, whose global norm is `norm`, and move the weights. A step that is not to count leaves this out."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint holds besides counters, by name: this rank's part, plain or sharded."""
        ...

    def load(self, read: Read, *, weights_only: bool = False) -> None:
        """Have `read` fill the tensors of `state` (`weights_only`: without the optimizer's), and go on with these values."""
        ...


def build_engine(recipe: Recipe, meshes: Meshes, device: torch.device) -> Engine:
    """The recipe's engine over these ranks, with initial values. Raises `RecipeError` where its package is missing."""
    if recipe.engine == "native":
        return NativeEngine.build(recipe, meshes, device)
    check_package(recipe.engine)
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # it would take CUDA where there is some
    from steptron.train.engines.deepspeed import build_deepspeed  # takes seconds to import

    return build_deepspeed(recipe, meshes, device)


def check_package(engine: str) -> None:
    """Raise `RecipeError` where the engine's package is missing."""
    if engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(
            "engine=deepspeed needs the package deepspeed, which is not installed; "
            "pip install 'steptron[deepspeed]', or set engine=native"
        )
