"""Training once more, as plainly as it can be written: float64, one process, from the rows of a batch to the weights
after the step.

    recipe ─► stages, batch sizes, rates by tokens
    rows ─► losses (naive.py) ─► objective ─► gradients ─► norm, clip ─► Muon, AdamW ─► router biases

Independent of the package's own maths: it takes a recipe, initial weights and rows, and nothing else. It is also the
shortest description of what a step is. Sources of the formulas: AdamW arXiv 1711.05101 · Muon arXiv 2502.16982 · Polar
Express arXiv 2505.16932 · router bias arXiv 2408.15664 · EP-group loss arXiv 2602.10604, eq. 1 · sequence loss arXiv
2412.19437, eq. 17 to 20 · z-loss arXiv 2202.08906, eq. 5."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from steptron.config.schema import BalanceConfig, LrConfig, ModelConfig, OptimConfig, Recipe, StageConfig

from naive import Naive

POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749473, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
Rows = tuple[list[list[int]], list[list[int]], list[list[float]]]
"""Tokens, documents and weights as targets of each row of a batch: it has `seq_len` tokens, the next, and one more for
each MTP head."""


@dataclass(frozen=True, kw_only=True)
class NaiveStep:
    """What one step came to."""

    stage: str
    rows: int
    lr: float
    bias_rate: float
    loss: float
    mtp_loss: float
    balance_loss: float
    total_loss: float
    grad_norm: float
    weights: dict[str, torch.Tensor]
    """Parameters and router biases after the step."""
    margin: float
    """The least by which any token prefers the last expert that it chose to the first that it passed over."""


@dataclass(kw_only=True)
class NaiveRun:
    """The weights of a run and the optimizers' memory of its gradients."""

    recipe: Recipe
    weights: dict[str, torch.Tensor]
    momenta: dict[str, torch.Tensor] = field(default_factory=dict)
    """Muon's, by matrix."""
    moments: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = field(default_factory=dict)
    """AdamW's first and second moment and its count of steps, by parameter."""

    def steps(self, rows_at: Callable[[str, range], Rows]) -> Iterator[NaiveStep]:
        """All steps of all stages. `rows_at`: the rows of a stage by their indices."""
        for name, stage in self.recipe.stages.items():
            tokens = samples = 0
            while tokens < stage.tokens:
                rows = next((ramp.batch_size for ramp in stage.ramp if tokens < ramp.until), stage.batch_size)
                batch = rows_at(name, range(samples, samples + rows))
                tokens, samples = tokens + rows * stage.seq_len, samples + rows
                # Rates are those of the step's last token, which the last step may put past the stage's budget.
                yield self._step(name, stage, batch, min(tokens, stage.tokens))

    def _step(self, name: str, stage: StageConfig, batch: Rows, tokens: int) -> NaiveStep:
        losses = batch_losses(self.recipe.model, stage, self.weights, batch)
        mtp_loss = torch.stack(losses.heads[1:]).mean()
        total = losses.heads[0] + stage.mtp_weight * mtp_loss + losses.balance
        gradients = self._gradients(total, stage)
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
        clip = min(1.0, self.recipe.optim.clip_norm / (norm + 1e-6))
        lr, rate = learning_rate(stage.lr, tokens, stage.tokens), bias_rate(stage.balance, tokens, stage.tokens)
        for parameter, gradient in gradients.items():
            self._move(parameter, clip * gradient, lr)
        for layer, counts in losses.counts.items():
            bias, mean = self.weights[f"layers.{layer}.moe.router.bias"], sum(counts) / len(counts)
            for expert, count in enumerate(counts):
                bias[expert] += rate * ((count < mean) - (count > mean))
        return NaiveStep(
            stage=name,
            rows=len(batch[0]),
            lr=lr,
            bias_rate=rate,
            loss=float(losses.heads[0].detach()),
            mtp_loss=float(mtp_loss.detach()),
            balance_loss=float(losses.balance.detach()),
            total_loss=float(total.detach()),
            grad_norm=norm,
            weights={key: tensor.detach().clone() for key, tensor in self.weights.items()},
            margin=losses.margin,
        )

    def _gradients(self, loss: torch.Tensor, stage: StageConfig) -> dict[str, torch.Tensor]:
        """The gradient of each parameter that the stage trains: a frozen router is left as it is."""
        names = [name for name in self.weights if not name.endswith("router.bias")]
        if stage.balance.freeze_router:
            names = [name for name in names if not name.endswith("router.weight")]
        gradients = torch.autograd.grad(loss, [self.weights[name] for name in names])
        return dict(zip(names, gradients, strict=True))

    def _move(self, name: str, gradient: torch.Tensor, lr: float) -> None:
        """Decay and update one parameter: embeddings, output matrices and vectors by AdamW, all other matrices by
        Muon."""
        optim, p = self.recipe.optim, self.weights[name].detach()
        if p.ndim == 1:
            p = p - lr * self._adamw(name, gradient, optim)
        elif name.endswith(("embedding.weight", "lm_head.weight")) or optim.matrix_optimizer == "adamw":
            p = p - lr * optim.weight_decay * p - lr * self._adamw(name, gradient, optim)
        else:
            scale = 0.2 * math.sqrt(max(p.shape[-2:]))
            p = p - lr * optim.weight_decay * p - lr * scale * self._muon(name, gradient, optim.momentum)
        self.weights[name] = p.requires_grad_()

    def _adamw(self, name: str, gradient: torch.Tensor, optim: OptimConfig) -> torch.Tensor:
        nothing = torch.zeros_like(gradient)
        first, second, step = self.moments.get(name, (nothing, nothing, 0))
        first = optim.beta1 * first + (1 - optim.beta1) * gradient
        second = optim.beta2 * second + (1 - optim.beta2) * gradient * gradient
        step += 1
        self.moments[name] = first, second, step
        return first / (1 - optim.beta1**step) / ((second / (1 - optim.beta2**step)).sqrt() + optim.eps)

    def _muon(self, name: str, gradient: torch.Tensor, momentum: float) -> torch.Tensor:
        self.momenta[name] = momentum * self.momenta.get(name, torch.zeros_like(gradient)) + gradient
        nesterov = gradient + momentum * self.momenta[name]
        return torch.stack([orthogonal(x) for x in nesterov]) if gradient.ndim == 3 else orthogonal(nesterov)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Polar Express of one matrix: each iteration but the last acts as if singular values were 1 % larger."""
    x = x / (x.norm() * 1.01 + 1e-7)
    for i, (a, b, c) in enumerate(POLAR_EXPRESS):
        x = x / 1.01 if i < len(POLAR_EXPRESS) - 1 else x
        x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
    return x


def learning_rate(lr: LrConfig, tokens: int, budget: int) -> float:
    """The learning rate when `tokens` of the stage's `budget` are done."""
    if tokens < lr.warmup:
        return lr.start + (lr.peak - lr.start) * tokens / lr.warmup
    if lr.kind == "constant" or lr.end is None:
        return lr.peak
    begin = budget - lr.decay if lr.kind == "wsd" else lr.warmup
    done = max(0.0, (tokens - begin) / (budget - begin))
    left = (1 + math.cos(math.pi * done)) / 2 if lr.kind == "cosine" else 1 - done
    return lr.end + (lr.peak - lr.end) * left


def bias_rate(balance: BalanceConfig, tokens: int, budget: int) -> float:
    """By how much a router bias is moved when `tokens` of the stage's `budget` are done."""
    if balance.freeze_router:
        return 0.0
    end = balance.bias_rate if balance.bias_rate_end is None else balance.bias_rate_end
    return balance.bias_rate * (1 - tokens / budget) + end * tokens / budget


@dataclass(frozen=True, kw_only=True)
class BatchLosses:
    """The terms of the objective, with gradients, and where the tokens of the batch went."""

    heads: list[torch.Tensor]
    """The weighted mean loss of the output matrix, then of each MTP head, each over its own targets in the whole
    batch."""
    balance: torch.Tensor
    """The balance losses with their coefficients, summed over layers: the mean over the rows of this batch."""
    counts: dict[int, list[int]]
    """By MoE layer: the tokens of each expert."""
    margin: float


def batch_losses(config: ModelConfig, stage: StageConfig, weights: dict[str, torch.Tensor], batch: Rows) -> BatchLosses:
    """The losses of one global batch."""
    heads, experts = 1 + config.num_mtp_heads, config.moe.num_experts
    nothing = torch.zeros((), dtype=torch.float64)
    sums, targets, balance, margin = [nothing] * heads, [0.0] * heads, nothing, math.inf
    counts = {layer: [0] * experts for layer in range(config.num_dense_layers, config.num_layers)}
    for tokens, documents, worth in zip(*batch, strict=True):
        naive = Naive(config, stage, weights)
        row = naive.losses([tokens], [documents], stage.seq_len, [worth])
        sums = [a + b for a, b in zip(sums, row, strict=True)]
        for h in range(heads):
            same = (t + h + 1 for t in range(stage.seq_len) if documents[t] == documents[t + h + 1])
            targets[h] += sum(worth[there] for there in same)
        for layer, routed in naive.routed.items():
            balance = balance + balance_loss(stage.balance, routed, experts)
            bias = weights[f"layers.{layer}.moe.router.bias"]
            for logits, chosen in routed:
                margin = min(margin, _margin(torch.sigmoid(logits.detach()) + bias, chosen))
                for expert in chosen:
                    counts[layer][expert] += 1
    means = [total / number if number else nothing for total, number in zip(sums, targets, strict=True)]
    return BatchLosses(heads=means, balance=balance / len(batch[0]), counts=counts, margin=margin)


def balance_loss(
    balance: BalanceConfig, routed: list[tuple[torch.Tensor, list[int]]], num_experts: int
) -> torch.Tensor:
    """The balance losses of one row in one layer, with their coefficients."""
    total = torch.zeros((), dtype=torch.float64)
    if balance.ep_loss:
        assert balance.num_groups is not None, "the recipe of a run names the groups"
        total = total + balance.ep_loss * group_loss(routed, num_experts, balance.num_groups)
    if balance.sequence_loss:
        total = total + balance.sequence_loss * group_loss(routed, num_experts, num_experts)
    if balance.z_loss:
        logits = torch.stack([logits for logits, _ in routed])
        total = total + balance.z_loss * (torch.logsumexp(logits, 1) ** 2).mean()
    return total


def group_loss(routed: list[tuple[torch.Tensor, list[int]]], num_experts: int, groups: int) -> torch.Tensor:
    """G · Σ_g f_g · p_g over one row: f, the share of selections in a group; p, the mean share of the router's
    probability there."""
    probabilities = torch.sigmoid(torch.stack([logits for logits, _ in routed]))
    p = (probabilities / probabilities.sum(1, keepdim=True)).mean(0)
    selected = [expert for _, chosen in routed for expert in chosen]
    size, total = num_experts // groups, torch.zeros((), dtype=torch.float64)
    for g in range(groups):
        f = sum(expert // size == g for expert in selected) / len(selected)
        total = total + groups * f * p[g * size : (g + 1) * size].sum()
    return total


def _margin(scores: torch.Tensor, chosen: list[int]) -> float:
    others = [e for e in range(len(scores)) if e not in chosen]
    return float(scores[chosen].min() - scores[others].max())
