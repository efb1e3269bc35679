"""`Optimizer` over all parameters, and which of Muon and AdamW moves each one, with or without weight decay.

hidden matrices (attention, FFN, experts, router, eh_proj) → Muon, or AdamW with decay if the recipe says so
embedding, output matrices → AdamW with decay
norms → AdamW without decay
"""

from collections.abc import Mapping

from torch import Tensor

from steptron.config.schema import OptimConfig
from steptron.optim.adamw import AdamW
from steptron.optim.muon import Muon
from steptron.optim.observe import UpdateObserver


def split_parameters(
    parameters: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters by name in three parts: hidden matrices, embedding and output matrices, vectors."""
    hidden: dict[str, Tensor] = {}
    outer: dict[str, Tensor] = {}
    vectors: dict[str, Tensor] = {}
    for name, p in parameters.items():
        if p.ndim == 1:
            vectors[name] = p
        elif name.endswith(("embedding.weight", "lm_head.weight")):
            outer[name] = p
        else:
            hidden[name] = p
    return hidden, outer, vectors


class Optimizer:
    """All optimizers of a model. Parameters without a gradient (a frozen router) stay unchanged."""

    def __init__(self, parts: list[Muon | AdamW]):
        self._parts = parts
        self.observer: UpdateObserver | None = None
        """The observer of every step, or None."""

    def step(self, lr: float) -> None:
        """Move all parameters by one step at this learning rate."""
        for part in self._parts:
            part.step(lr, self.observer)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self._parts:
            for p in part.parameters.values():
                p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return every state tensor, sharded like its parameter, by `<parameter>.<name>`. Loading a checkpoint writes
        into them."""
        return {f"{name}.{key}": t for part in self._parts for name, s in part.state.items() for key, t in s.items()}


def build_optimizer(parameters: Mapping[str, Tensor], config: OptimConfig) -> Optimizer:
    """Build the recipe's optimizer over this rank's parameters, by name, of a model that is already laid over its
    ranks."""
    hidden, outer, vectors = split_parameters(parameters)
    adamw = {"beta1": config.beta1, "beta2": config.beta2, "eps": config.eps}
    if config.matrix_optimizer == "adamw":
        outer = hidden | outer
    parts: list[Muon | AdamW] = [
        AdamW.of(outer, config.weight_decay, **adamw),
        AdamW.of(vectors, 0.0, **adamw),
    ]
    if config.matrix_optimizer == "muon":
        parts.insert(0, Muon.of(hidden, config.weight_decay, config.momentum))
    return Optimizer(parts)
