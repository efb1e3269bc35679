"""The objective of a micro-batch: the scalar whose gradient is taken, and the sums that are logged.

    objective = Σ_h scale_h · loss_h + balance_scale · balance      (balance contains its own coefficients)

The scales contain the weights of the heads, and the division by the weights of all targets in the global batch. So the
objectives of all micro-batches on all ranks add up to the loss of the step.

Legend: H heads (output and MTP).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from steptron.model.heads import Loss, LossSums
from steptron.model.inputs import Inputs
from steptron.model.transformer import Outputs, Transformer


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of a step, and the weights of its terms."""

    loss: Loss
    scale_H: Tensor
    """fp32: weight of each head ÷ Σ weight of its targets in the global batch."""
    balance_scale: float
    """1 ÷ number of rows of the global batch."""

    def __call__(self, part: Transformer, outputs: Outputs, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return `total` of a micro-batch from the outputs of a complete network."""
        return self.total(self.loss(part, outputs, inputs))

    def total(self, sums: LossSums) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's part of the step's loss (a scalar), and the sums of its terms [H + 1].

        The sums are those of the heads, then the balance loss; fp64, without gradient.
        """
        total = (sums.heads_H * self.scale_H).sum() + self.balance_scale * sums.balance
        return total, torch.cat([sums.heads_H, sums.balance[None]]).detach().double()

    def zeros(self) -> Tensor:
        """Return sums of zero, for no micro-batch."""
        return torch.zeros(len(self.scale_H) + 1, dtype=torch.float64, device=self.scale_H.device)
