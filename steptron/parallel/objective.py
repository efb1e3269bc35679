"""From the sums of a micro-batch's losses to the number whose gradient is taken, and to what is logged.

    objective = Σ_h scale_h · loss_h + balance_scale · balance, whose own coefficients are in it

Scales carry the weights of the heads and the division by the targets of the whole global batch, so that the objectives of all
micro-batches on all ranks add up to the loss of the step.
Legend: H heads (output and MTP).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from steptron.model.transformer import LossSums


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The weights of a step's loss terms."""

    scale_H: Tensor
    """fp32: weight of each head ÷ its targets in the global batch."""
    balance_scale: float
    """1 ÷ rows of the global batch."""

    def __call__(self, losses: LossSums) -> Tensor:
        """A micro-batch's part of the loss of the step; a scalar."""
        heads_H = torch.cat([losses.lm[None], losses.mtp])
        return (heads_H * self.scale_H).sum() + self.balance_scale * losses.balance

    def terms(self, losses: LossSums) -> Tensor:
        """The sums themselves, heads first, the balance loss last [H + 1], fp64."""
        return torch.cat([losses.lm[None], losses.mtp, losses.balance[None]]).double()

    def zeros(self) -> Tensor:
        """Terms of nothing."""
        return torch.zeros(len(self.scale_H) + 1, dtype=torch.float64, device=self.scale_H.device)
