"""One optimizer step, from the micro-batches of one global batch to numbers that are the same on every rank.

Legend: L MoE layers, E experts, H heads (output and MTP).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from steptron.config.schema import moe_layers
from steptron.model.inputs import Inputs
from steptron.moe.balance import update_bias
from steptron.optim.groups import Optimizer
from steptron.parallel.grad_norm import clip_gradients
from steptron.parallel.network import Network
from steptron.parallel.objective import Objective


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What the stage and the schedule say about one step."""

    seq_len: int
    batch_size: int
    lr: float
    bias_rate: float
    mtp_weight: float
    ep_loss: float
    clip_norm: float


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """This rank's micro-batches of one global batch."""

    inputs: list[Inputs]
    targets_H: Tensor
    """Unmasked targets of each head in the whole global batch, int64."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step yields; the same on all ranks."""

    loss: float
    lm_loss: float
    mtp_loss: float
    balance_loss: float
    grad_norm: float
    expert_counts_LE: Tensor
    """Tokens by MoE layer and expert over the global batch, int64."""


def train_step(network: Network, optimizer: Optimizer, batch: StepBatch, settings: StepSettings) -> StepResult:
    """Forward, backward, reduce, clip, update; then the router biases. Each loss is its sum over the global batch ÷ its targets there."""
    optimizer.zero_grad()
    targets_H = batch.targets_H
    weights_H = torch.full(targets_H.shape, settings.mtp_weight / max(1, len(targets_H) - 1), device=network.device)
    weights_H[0] = 1.0
    objective = Objective(
        scale_H=weights_H / targets_H.clamp(min=1), balance_scale=settings.ep_loss / settings.batch_size
    )
    sums = network.forward_backward([inputs.to(network.device) for inputs in batch.inputs], objective)
    grad_norm = clip_gradients((p for _, p in network.named_parameters()), settings.clip_norm)
    optimizer.step(settings.lr)
    network.values_changed()
    counts_LE = update_routers(network, settings.bias_rate)
    dist.all_reduce(sums)
    means = (sums[:-1] / targets_H.clamp(min=1)).tolist()
    balance = float(sums[-1]) / settings.batch_size
    mtp_loss = sum(means[1:]) / max(1, len(means) - 1)
    return StepResult(
        loss=means[0] + settings.mtp_weight * mtp_loss + settings.ep_loss * balance,
        lm_loss=means[0],
        mtp_loss=mtp_loss,
        balance_loss=balance,
        grad_norm=float(grad_norm),
        expert_counts_LE=counts_LE.cpu(),
    )


def update_routers(network: Network, rate: float) -> Tensor:
    """Sum the expert counts of all MoE layers over all ranks [L, E] and move the router biases that are here by them."""
    layers = moe_layers(network.config)
    counts_LE = torch.zeros(len(layers), network.config.moe.num_experts, dtype=torch.int64, device=network.device)
    for n, moe in network.moe_layers().items():
        counts_LE[n - layers.start] = moe.take_counts()
    dist.all_reduce(counts_LE)
    if rate > 0:
        for n, moe in network.moe_layers().items():
            update_bias(moe.router.bias, counts_LE[n - layers.start], rate)
    return counts_LE
