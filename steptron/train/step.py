"""One optimizer step, from the micro-batches of one global batch to numbers that are the same on every rank.

Legend: L MoE layers, E experts, H heads (output and MTP).
"""

from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from steptron.config.schema import moe_layers
from steptron.errors import RouterError
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
    """Forward, backward, reduce, clip, update; then the router biases. Each loss is its sum over the global batch ÷ its targets there.

    Raises `RouterError` where a router's logits are not finite; the weights are no use then."""
    optimizer.zero_grad()
    targets_H = batch.targets_H
    weights_H = torch.full(targets_H.shape, settings.mtp_weight / max(1, len(targets_H) - 1), device=network.device)
    weights_H[0] = 1.0
    objective = Objective(scale_H=weights_H / targets_H.clamp(min=1), balance_scale=1 / settings.batch_size)
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
        loss=means[0] + settings.mtp_weight * mtp_loss + balance,
        lm_loss=means[0],
        mtp_loss=mtp_loss,
        balance_loss=balance,
        grad_norm=float(grad_norm),
        expert_counts_LE=counts_LE,
    )


def update_routers(network: Network, rate: float) -> Tensor:
    """Sum the expert counts of all MoE layers over all ranks [L, E], on the host, and move the router biases that are here by them.

    Raises `RouterError` on all ranks, with layer and rank, where logits of any were not finite."""
    layers = moe_layers(network.config)
    seen_LE1 = torch.zeros(len(layers), network.config.moe.num_experts + 1, dtype=torch.int64, device=network.device)
    for n, moe in network.moe_layers().items():
        seen_LE1[n - layers.start] = torch.cat([moe.take_counts(), moe.take_broken()[None]])
    here_L = seen_LE1[:, -1].clone()
    dist.all_reduce(seen_LE1)
    counts_LE = seen_LE1[:, :-1]
    if rate > 0:
        for n, moe in network.moe_layers().items():
            update_bias(moe.router.bias, counts_LE[n - layers.start], rate)
    seen_LE1 = seen_LE1.cpu()  # the host waits for the device once, for the counts and for what is broken
    if seen_LE1[:, -1].any():
        _refuse(here_L, layers)
    return seen_LE1[:, :-1]


def _refuse(broken_L: Tensor, layers: range) -> NoReturn:
    """Name the first layer whose logits were not finite, and the first rank where they were."""
    broken_WL = [torch.empty_like(broken_L) for _ in range(dist.get_world_size())]
    dist.all_gather(broken_WL, broken_L)
    first, rank = min(
        (int(layer), rank) for rank, broken in enumerate(broken_WL) for layer in broken.nonzero().flatten()
    )
    raise RouterError(
        f"router logits of layer {layers[first]} are NaN or infinite on rank {rank}; nothing was saved: go on from the newest "
        "checkpoint with `steptron resume`, with a lower learning rate or with activation limits, or from an earlier one"
    )
