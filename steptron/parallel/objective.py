"""From the outputs of a micro-batch to the number whose gradient is taken, and to what is logged.

    objective = Σ_h scale_h · loss_h + balance_scale · balance, whose own coefficients are in it

Scales carry the weights of the heads and the division by the weights of all targets of the global batch, so that the objectives of all
micro-batches on all ranks add up to the loss of the step.
Legend: H heads (output and MTP).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from steptron.model.heads import Loss
from steptron.model.inputs import Inputs
from steptron.model.transformer import Outputs, Transformer


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of a step, and the weights of its terms."""

    loss: Loss
    scale_H: Tensor
    """fp32: weight of each head ÷ Σ weight of its targets in the global batch."""
    balance_scale: float
    """1 ÷ rows of the global batch."""

    def __call__(self, part: Transformer, outputs: Outputs, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's part of the loss of the step, a scalar, and the sums in it: heads, then balance [H + 1], fp64,
        without gradient."""
        sums = self.loss(part, outputs, inputs)
        total = (sums.heads_H * self.scale_H).sum() + self.balance_scale * sums.balance
        return total, torch.cat([sums.heads_H, sums.balance[None]]).detach().double()

    def zeros(self) -> Tensor:
        """Return the sums of nothing."""
        return torch.zeros(len(self.scale_H) + 1, dtype=torch.float64, device=self.scale_H.device)
