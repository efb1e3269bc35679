"""AdamW on this rank's shards, through torch's fused kernel. Elementwise, so sharding needs no communication.

Source: Loshchilov and Hutter, arXiv 1711.05101.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from steptron.nn.to_local import local
from steptron.optim.observe import UpdateObserver, watched


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Parameters with one weight decay, and their moments.

    The moments are created at once, so that a checkpoint loads in place.
    """

    parameters: dict[str, Tensor]
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    state: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, parameters: dict[str, Tensor], weight_decay: float, beta1: float, beta2: float, eps: float) -> "AdamW":
        """Make the optimizer with moments of zero."""
        state = {
            name: {
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
                "step": torch.zeros((), device=p.device),
            }
            for name, p in parameters.items()
        }
        return cls(parameters=parameters, weight_decay=weight_decay, beta1=beta1, beta2=beta2, eps=eps, state=state)

    @torch.no_grad()
    def step(self, lr: float, observer: UpdateObserver | None = None) -> None:
        """Move every parameter that has a gradient.

        A rank with no row of a parameter counts the step too: a checkpoint takes the count from any rank."""
        names = [name for name, p in self.parameters.items() if p.grad is not None]
        if observer is None:
            self._move(names, lr)
            return
        for name in names:  # one at a time, so that the old values of only one parameter are kept
            with watched(observer, name, local(self.parameters[name])):
                self._move([name], lr)

    def _move(self, names: list[str], lr: float) -> None:
        if not names:
            return
        adamw(
            [local(self.parameters[name]) for name in names],
            [local(self.parameters[name].grad) for name in names],  # pyright: ignore[reportArgumentType]
            [local(self.state[name]["exp_avg"]) for name in names],
            [local(self.state[name]["exp_avg_sq"]) for name in names],
            [],
            [self.state[name]["step"] for name in names],
            fused=True,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=lr,
            weight_decay=self.weight_decay,
            eps=self.eps,
            maximize=False,
        )
