"""One optimizer step, from the micro-batches of one global batch to numbers that are the same on every rank.

Legend: L MoE layers, E experts.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from steptron.data.loader import Batch
from steptron.model.targets import count_targets
from steptron.model.transformer import Transformer
from steptron.moe.balance import update_bias
from steptron.nn.packing import Packing
from steptron.optim.groups import Optimizer
from steptron.parallel.grad_norm import clip_gradients


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
class StepResult:
    """What one step yields; the same on all ranks."""

    loss: float
    lm_loss: float
    mtp_loss: float
    balance_loss: float
    grad_norm: float
    expert_counts_LE: Tensor
    """Tokens by MoE layer and expert over the global batch, int64."""


def train_step(model: Transformer, optimizer: Optimizer, batches: list[Batch], settings: StepSettings) -> StepResult:
    """Forward, backward, reduce, clip, update; then the router biases. Each loss is its sum over the global batch ÷ its targets there."""
    device, T = model.embedding.weight.device, settings.seq_len
    optimizer.zero_grad()
    targets = (
        torch.stack([count_targets(batch.documents_BS, T, 1 + len(model.mtp)) for batch in batches]).sum(0).to(device)
    )
    dist.all_reduce(targets)
    weights = torch.full(targets.shape, settings.mtp_weight / max(1, len(model.mtp)), device=device)
    weights[0] = 1.0
    scale = weights / targets.clamp(min=1)
    balance_scale = settings.ep_loss / settings.batch_size
    sums = torch.zeros(2 + len(model.mtp), dtype=torch.float64, device=device)
    for batch in batches:
        packing = Packing.from_documents(batch.documents_BS[:, :T]).to(device)
        losses = model(batch.tokens_BS.to(device), batch.documents_BS.to(device), packing)
        terms = torch.cat([losses.lm[None], losses.mtp])
        ((terms * scale).sum() + balance_scale * losses.balance).backward()
        sums += torch.cat([terms, losses.balance[None]]).detach()
    grad_norm = clip_gradients(model.parameters(), settings.clip_norm)
    optimizer.step(settings.lr)
    counts_LE = update_routers(model, settings.bias_rate)
    dist.all_reduce(sums)
    means = (sums[:-1] / targets.clamp(min=1)).tolist()
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


def update_routers(model: Transformer, rate: float) -> Tensor:
    """Sum the expert counts of all MoE layers over all ranks [L, E] and move the router biases by them."""
    layers = list(model.moe_layers().values())
    if not layers:
        return torch.zeros(0, 0, dtype=torch.int64)
    counts_LE = torch.stack([moe.take_counts() for moe in layers])
    dist.all_reduce(counts_LE)
    if rate > 0:
        for moe, counts_E in zip(layers, counts_LE, strict=True):
            update_bias(moe.router.bias, counts_E, rate)
    return counts_LE
