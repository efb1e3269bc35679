"""An engine shards parameters, sums gradients and updates weights. Step, loop and metrics know nothing else of it.

    zero_grad ─► forward and backward of the network ─► gradient_squares ─► (the judge of the step) ─► update
    state ─► checkpoint          checkpoint ─► load

    native.py       torch's FSDP2, Muon and AdamW; every layout
    deepspeed.py    DeepSpeed's ZeRO 1, 2, 3 and AdamW; data and expert parallel layouts; imported only if needed
    zero_shards.py  the position of a parameter's elements in ZeRO's vectors and in a checkpoint's shards

Both give tensors of the same names and shapes to a checkpoint, so a run saved under one continues under the other.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from steptron.config.schema import Recipe
from steptron.errors import RecipeError
from steptron.optim.observe import UpdateObserver
from steptron.optim.optimizer import build_optimizer
from steptron.parallel.apply import build_network, build_unsharded
from steptron.parallel.mesh import Meshes
from steptron.parallel.network import Network
from steptron.train.engines.native import NativeEngine

Read = Callable[[dict[str, Tensor]], None]
"""A function that fills tensors in place, by their names in a checkpoint."""


class Engine(Protocol):
    """The engine of one rank. All ranks call it together."""

    network: Network
    """This rank's share of the model. Its `forward_backward` adds to the gradients."""

    def observe(self, observer: UpdateObserver | None) -> None:
        """Show every update to `observer`."""
        ...

    def zero_grad(self) -> None:
        """Drop all gradients, also those of a step that was not followed by an update."""
        ...

    def gradient_squares(self) -> Tensor:
        """Return Σ g² of this rank's part of each parameter, float64 [P] in the network's order.

        Over all ranks every element counts once.
        """
        ...

    def update(self, norm: Tensor, max_norm: float, lr: float) -> None:
        """Clip the gradient, whose global norm is `norm`, and update the weights. Left out if a step must not count."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return this rank's part of everything that a checkpoint holds besides counters, plain or sharded, by name."""
        ...

    def load(self, read: Read, *, weights_only: bool = False) -> None:
        """Fill the tensors of `state` with `read`, and continue with these values.

        `weights_only`: leave out the optimizer's tensors.
        """
        ...


def build_engine(recipe: Recipe, meshes: Meshes, device: torch.device) -> Engine:
    """Return the engine over these ranks, with initial values. Raises `RecipeError` if its package is missing."""
    if recipe.engine == "native":
        network = build_network(recipe, meshes, device)
        return NativeEngine(network, build_optimizer(dict(network.named_parameters()), recipe.optim))
    check_package(recipe.engine)
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # DeepSpeed would use any CUDA device that exists
    from steptron.train.engines.deepspeed import ZeroEngine  # takes seconds to import

    model = build_unsharded(recipe, meshes, device)
    return ZeroEngine(
        model, meshes, device, recipe.optim, zero=recipe.deepspeed.zero, precision=recipe.precision, seed=recipe.seed
    )


def check_package(engine: str) -> None:
    """Raise `RecipeError` if the package of the engine is missing."""
    if engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(
            "engine=deepspeed needs the package deepspeed, which is not installed; "
            "pip install 'steptron[deepspeed]', or set engine=native"
        )
