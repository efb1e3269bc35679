"""One optimizer step, from the micro-batches of a global batch to numbers that are the same on every rank.

    forward, backward ─► sums of this rank ─ all-reduce ─► StepResult ─► judge ─► clip, update, router biases

With `kernels.capacity` as a factor, buffers of experts may turn out too small. Then forward and backward are repeated
with exact sizes before anybody judges the step.

Legend: L MoE layers, E experts, H heads (output and MTP), P parameters of this rank, W ranks.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from steptron.config.schema import moe_layers
from steptron.model.heads import Loss
from steptron.model.inputs import Inputs
from steptron.moe.balance import update_bias
from steptron.parallel.network import Network
from steptron.parallel.objective import Objective
from steptron.train.engines import Engine


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The settings of one step, from the stage and its schedules."""

    seq_len: int
    """The number of input tokens of a sequence."""
    batch_size: int
    """The number of sequences in the global batch."""
    lr: float
    """The learning rate."""
    bias_rate: float
    """The size of a change of a router bias. 0 leaves them as they are."""
    mtp_weight: float
    """The weight of the mean MTP loss."""
    clip_norm: float
    """The largest norm of the gradient."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """This rank's micro-batches of one global batch."""

    inputs: list[Inputs]
    """The model's inputs of each micro-batch."""
    weights_H: Tensor
    """Σ weight of each head's targets in the global batch, float64 on the device."""
    notices: Tensor
    """Values that the loop exchanges between ranks, summed over them, float64 on the host.

    Read them after the result of the step: their copy to the host is queued before it, while a later copy would wait
    for the update.
    """


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of one step before its update; the same on all ranks."""

    terms: dict[str, float]
    """The losses by name: `loss`, of the next token; `mtp_loss`, the mean over MTP heads; `balance_loss`, with its
    coefficients; and `total_loss`, of which the gradient was taken."""
    target_weight: float
    """Σ weight of the next tokens of the global batch. If it is 0, there is nothing to learn from and no update."""
    grad_norm: float
    """The norm of the whole gradient before it is clipped."""
    expert_counts_LE: Tensor
    """The tokens by MoE layer and expert over the global batch, int64, on the host."""
    broken: tuple[int, int] | None = None
    """The first layer, and the first rank, whose router logits were NaN or infinite."""
    overflow: dict[int, int] = field(default_factory=dict)
    """The choices that did not fit, by layer, over all ranks, where this result is that of the repeated pass."""


class Judge(Protocol):
    """Decides whether the update of a step may be made. All ranks' judges decide the same."""

    def see(self, squares_P: Tensor) -> None:
        """Look at the network after backward. `squares_P`: see `Engine.gradient_squares`. All ranks call it."""
        ...

    def forget(self) -> None:
        """Drop what was seen of the step, because forward and backward are repeated."""
        ...

    def allows(self, result: StepResult) -> bool:
        """Return whether weights and router biases may be updated."""
        ...


class Lenient:
    """A judge that allows every update."""

    def see(self, squares_P: Tensor) -> None:
        """Do nothing."""

    def forget(self) -> None:
        """Do nothing."""

    def allows(self, result: StepResult) -> bool:
        """Return True."""
        return True


class _Totals(NamedTuple):
    """Sums over all ranks, on the device."""

    losses_H: Tensor
    """Each head's loss times the weight, summed over its targets, float64."""
    balance: Tensor
    """The balance losses, summed over rows."""
    squares: Tensor
    """The square of the gradient norm."""
    counts_LE: Tensor
    """The tokens by MoE layer and expert, float64, which is exact for integers up to 2^53."""
    broken_L: Tensor
    """The number of forward passes whose router logits were not finite, by layer."""
    overflow_L: Tensor
    """The number of choices that did not fit, by layer."""


def train_step(engine: Engine, batch: StepBatch, settings: StepSettings, judge: Judge, loss: Loss) -> StepResult:
    """Run forward and backward, and reduce the results over all ranks. If there is a target and `judge` allows it, clip
    the gradient and update weights and router biases.

    The loss of a head is its sum over the global batch ÷ Σ weight of its targets there.
    """
    network = engine.network
    share = settings.mtp_weight / max(1, len(batch.weights_H) - 1)
    shares_H = torch.full(batch.weights_H.shape, share, device=network.device)
    shares_H[0] = 1.0
    scale_H = _divided(shares_H.double(), batch.weights_H).float()
    objective = Objective(loss=loss, scale_H=scale_H, balance_scale=1 / settings.batch_size)
    repeated: dict[int, int] = {}
    with ExitStack() as sizes:
        while True:
            engine.zero_grad()
            sums = network.forward_backward(batch.inputs, objective)
            squares_P = engine.gradient_squares()
            judge.see(squares_P)
            totals, broken_here_L = _reduce(network, sums, squares_P)
            result = _result(network, totals, broken_here_L, batch.weights_H, settings)
            if not result.overflow:
                break
            judge.forget()
            repeated = result.overflow
            sizes.enter_context(network.exact())
    result = replace(result, overflow=repeated)
    if result.target_weight and judge.allows(result):
        engine.update(totals.squares.sqrt(), settings.clip_norm, settings.lr)
        move_biases(network, totals.counts_LE, settings.bias_rate)
    return result


def _divided(sums_H: Tensor, weights_H: Tensor) -> Tensor:
    """Return sums ÷ weights; 0 for a head without targets, whose sum is 0."""
    return torch.where(weights_H > 0, sums_H / weights_H, 0.0)


def move_biases(network: Network, counts_LE: Tensor, rate: float) -> None:
    """Update the router biases on this rank from the experts' loads over the global batch."""
    first, counts_LE = moe_layers(network.config).start, counts_LE.long()
    if rate > 0:
        for n, moe in network.moe_layers().items():
            update_bias(moe.router.bias, counts_LE[n - first], rate)


def _reduce(network: Network, sums: Tensor, squares_P: Tensor) -> tuple[_Totals, Tensor]:
    """Return all sums of the step over all ranks, by one all-reduce, and the broken forward passes of this rank by
    layer."""
    layers, num_experts = moe_layers(network.config), network.config.moe.num_experts
    seen_LE2 = torch.zeros(len(layers), num_experts + 2, dtype=torch.float64, device=network.device)
    for n, moe in network.moe_layers().items():
        faults_2 = torch.stack([moe.take_broken(), moe.take_overflow()])
        seen_LE2[n - layers.start] = torch.cat([moe.take_counts(), faults_2])
    here_L = seen_LE2[:, -2].clone()
    vector = torch.cat([sums, squares_P.sum()[None], seen_LE2.flatten()])
    dist.all_reduce(vector)
    terms, squares, seen = vector.split([len(sums), 1, seen_LE2.numel()])
    seen_LE2 = seen.view_as(seen_LE2)
    return _Totals(terms[:-1], terms[-1], squares[0], seen_LE2[:, :-2], *seen_LE2[:, -2:].unbind(1)), here_L


def _result(
    network: Network, totals: _Totals, broken_here_L: Tensor, weights_H: Tensor, settings: StepSettings
) -> StepResult:
    """Return the totals on the host. Here the host waits for the device, once per step."""
    means_H = _divided(totals.losses_H, weights_H)
    scalars = torch.cat([means_H, torch.stack([totals.balance, totals.squares.sqrt(), weights_H[0]])])
    layers, parts = moe_layers(network.config), (totals.broken_L, totals.overflow_L, totals.counts_LE.flatten())
    host = torch.cat([scalars, *parts]).cpu()
    scalars, broken_L, overflow_L, counts = host.split([len(scalars), *(len(part) for part in parts)])
    *means, balance, norm, weight = scalars.tolist()
    mtp_loss = sum(means[1:]) / max(1, len(means) - 1)
    balance /= settings.batch_size
    return StepResult(
        terms={
            "loss": means[0],
            "mtp_loss": mtp_loss,
            "balance_loss": balance,
            "total_loss": means[0] + settings.mtp_weight * mtp_loss + balance,
        },
        target_weight=weight,
        grad_norm=norm,
        expert_counts_LE=counts.view(totals.counts_LE.shape).long(),
        broken=_first_broken(broken_here_L, layers) if broken_L.any() else None,
        overflow={n: int(count) for n, count in zip(layers, overflow_L, strict=True) if count},
    )


def _first_broken(here_L: Tensor, layers: range) -> tuple[int, int]:
    """Return the first layer whose logits were not finite, and the first rank of it. All ranks call it."""
    broken_WL = [torch.empty_like(here_L) for _ in range(dist.get_world_size())]
    dist.all_gather(broken_WL, here_L)
    row, rank = min((int(row), rank) for rank, broken in enumerate(broken_WL) for row in broken.nonzero().flatten())
    return layers[row], rank
