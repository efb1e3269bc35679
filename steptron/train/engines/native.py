"""The native engine: a network that FSDP2 has sharded, and our optimizers on its shards."""

from collections.abc import Callable

import torch
from torch import Tensor

from steptron.config.schema import Recipe
from steptron.model.inputs import Inputs
from steptron.optim.groups import Optimizer, build_optimizer
from steptron.optim.observe import UpdateObserver
from steptron.parallel.apply import build_network
from steptron.parallel.grad_norm import clip_gradients, gradient_squares
from steptron.parallel.mesh import Meshes
from steptron.parallel.network import Network
from steptron.parallel.objective import Objective


class NativeEngine:
    """See `Engine`. Tensors of `state` are the live ones."""

    def __init__(self, network: Network, optimizer: Optimizer):
        self.network, self.optimizer = network, optimizer

    @classmethod
    def build(cls, recipe: Recipe, meshes: Meshes, device: torch.device) -> "NativeEngine":
        """With initial values."""
        network = build_network(recipe, meshes, device)
        return cls(network, build_optimizer(dict(network.named_parameters()), recipe.optim))

    def observe(self, observer: UpdateObserver | None) -> None:
        """Have every update shown to `observer`."""
        self.optimizer.observer = observer

    def forward_backward(self, inputs: list[Inputs], objective: Objective) -> Tensor:
        """Gradients of a step; this rank's sums of the loss terms."""
        self.optimizer.zero_grad()
        return self.network.forward_backward(inputs, objective)

    def gradient_squares(self) -> Tensor:
        """Σ g² by parameter; see `grad_norm.gradient_squares`."""
        return gradient_squares(p for _, p in self.network.named_parameters())

    def update(self, norm: Tensor, max_norm: float, lr: float) -> None:
        """Clip, and move the weights."""
        clip_gradients((p for _, p in self.network.named_parameters()), norm, max_norm)
        self.optimizer.step(lr)
        self.network.values_changed()

    def state(self) -> dict[str, Tensor]:
        """Weights, router biases, optimizer state."""
        return self._weights() | {f"optimizer.{name}": t for name, t in self.optimizer.state().items()}

    def load(self, read: Callable[[dict[str, Tensor]], None], *, weights_only: bool = False) -> None:
        """Have `read` fill them."""
        read(self._weights() if weights_only else self.state())
        self.network.values_changed()

    def _weights(self) -> dict[str, Tensor]:
        return {f"model.{name}": tensor for name, tensor in self.network.state().items()}
