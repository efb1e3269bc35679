"""The native engine's update of an FSDP2-sharded network: gradient squares, clipping, Muon and AdamW; its state."""

from collections.abc import Callable

from torch import Tensor

from steptron.optim.observe import UpdateObserver
from steptron.optim.optimizer import Optimizer
from steptron.parallel.grad_norm import clip_gradients, gradient_squares
from steptron.parallel.network import Network


class NativeEngine:
    """See `Engine`. The tensors of `state` are the live ones."""

    def __init__(self, network: Network, optimizer: Optimizer):
        self.network, self.optimizer = network, optimizer

    def observe(self, observer: UpdateObserver | None) -> None:
        """Show every update to `observer`."""
        self.optimizer.observer = observer

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.optimizer.zero_grad()

    def gradient_squares(self) -> Tensor:
        """Return Σ g² by parameter; see `grad_norm.gradient_squares`."""
        return gradient_squares(p for _, p in self.network.named_parameters())

    def update(self, norm: Tensor, max_norm: float, lr: float) -> None:
        """Clip the gradients and update the weights."""
        clip_gradients((p for _, p in self.network.named_parameters()), norm, max_norm)
        self.optimizer.step(lr)
        self.network.values_changed()

    def state(self) -> dict[str, Tensor]:
        """Return weights, router biases and optimizer state."""
        return self._weights() | {f"optimizer.{name}": t for name, t in self.optimizer.state().items()}

    def load(self, read: Callable[[dict[str, Tensor]], None], *, weights_only: bool = False) -> None:
        """Fill the tensors of `state` with `read`."""
        read(self._weights() if weights_only else self.state())
        self.network.values_changed()

    def _weights(self) -> dict[str, Tensor]:
        return {f"model.{name}": tensor for name, tensor in self.network.state().items()}
