"""The load of experts under each way of balancing: none, the router bias, and the bias with the EP-group loss.

A small network is trained on skewed text.

    python benchmarks/balance.py [--steps N] [--plot FILE.svg]

The text is made up: half of it consists of a few bigrams that come again and again, so that a few experts are wanted
most. All three runs start from the same weights and read the same batches. Shown are, over the last tenth of the steps:

    MaxVio by expert   largest load of an expert in the global batch ÷ its fair share, − 1; mean over layers
    MaxVio by group    the same of the groups of experts that ranks of expert parallelism would hold
    worst group        largest load of a group in a micro-batch ÷ its fair share; the worst layer's mean. It is what the
                       slowest rank has to compute, for a micro-batch at a time

Goals: with bias and EP-group loss the worst group has at most 1.10 of its fair share of the global batch and MaxVio by
expert is below 0.5, where with nothing both are at least twice as far from even. Each run has
a process of one thread.

Legend: L MoE layers, E experts, G groups, B rows, S tokens of a row with its targets.
"""

import argparse
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from steptron.config.resolve import resolve
from steptron.config.schema import BalanceConfig, LimitsConfig, LrConfig, Recipe, StageConfig
from steptron.data.loader import Batch
from steptron.model.heads import TokenLoss
from steptron.model.inputs import Rows
from steptron.moe.stats import Observation
from steptron.train.batch import step_batch, step_settings
from steptron.train.device import keep_heap
from steptron.train.engines import build_engine
from steptron.train.process_group import launched_layouts, meshes_over, process_group
from steptron.train.step import Lenient, train_step

GROUPS, T, ROWS, MICRO_BATCH = 8, 128, 32, 16
BIGRAMS = 16
WAYS = {
    "(a) nothing": BalanceConfig(),
    "(b) bias": BalanceConfig(bias_rate=1e-2, bias_rate_end=5e-4),
    "(c) bias + EP-group loss": BalanceConfig(bias_rate=1e-2, bias_rate_end=5e-4, ep_loss=3e-2, num_groups=GROUPS),
}
WORST_GROUP, MAX_VIO = 1.10, 0.5
"""At most so much with (c)."""


@dataclass
class Curves:
    """A number a step."""

    loss: list[float] = field(default_factory=list)
    expert_vio: list[float] = field(default_factory=list)
    group_vio: list[float] = field(default_factory=list)
    worst_group: list[float] = field(default_factory=list)

    def end(self, name: str) -> float:
        """Mean of the last tenth."""
        values = getattr(self, name)
        return statistics.mean(values[-max(1, len(values) // 10) :])


class Watch:
    """An observer of a layer that keeps how much the most loaded group has in each micro-batch."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def observe(self, seen: Observation) -> None:
        self.shares.append(float(violation(seen.counts_E.unflatten(0, (GROUPS, -1)).sum(1))) + 1)

    def take(self) -> float:
        """Mean over the micro-batches since the last call."""
        shares, self.shares = self.shares, []
        return statistics.mean(shares)


def violation(loads: Tensor) -> Tensor:
    """Largest ÷ mean − 1 over the last dim: MaxVio (arXiv 2408.15664)."""
    return loads.amax(-1) / loads.double().mean(-1) - 1


def skewed_rows(recipe: Recipe, step: int) -> Batch:
    """Half of the tokens are of `BIGRAMS` bigrams, the others follow Zipf's law."""
    generator = torch.Generator().manual_seed(1000 + step)
    vocab, S = recipe.model.vocab_size, T + 1 + recipe.model.num_mtp_heads
    zipf = 1 / torch.arange(1.0, vocab + 1)
    rare = torch.multinomial(zipf, ROWS * S, replacement=True, generator=generator).view(ROWS, S)
    rare = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))[rare]
    bigram = torch.randint(BIGRAMS, (ROWS, S), generator=generator)
    frequent = torch.where(torch.arange(S) % 2 == 0, 2 * bigram, 2 * bigram.roll(1, dims=1) + 1)
    half = (torch.rand(ROWS, (S + 1) // 2, generator=generator) < 0.5).repeat_interleave(2, dim=1)[:, :S]
    tokens = torch.where(half, frequent, rare)
    return Batch(Rows.unweighted(tokens, torch.zeros_like(tokens, dtype=torch.int32)), ("skewed",) * ROWS)


def recipe(balance: BalanceConfig, steps: int) -> Recipe:
    """The demo's network made smaller, with two MoE layers of 32 experts. The bias rate falls over the steps, as the
    learning rate does."""
    demo = resolve("demo", ["precision=fp32", "optim.matrix_optimizer=adamw"])
    base = next(iter(demo.stages.values()))
    stage: StageConfig = replace(
        base,
        tokens=steps * ROWS * T,
        seq_len=T,
        batch_size=ROWS,
        micro_batch=MICRO_BATCH,
        ramp=(),
        lr=LrConfig(kind="cosine", peak=2e-3, end=1e-4, warmup=20 * ROWS * T),
        balance=balance,
        limits=LimitsConfig(),
    )
    moe = replace(demo.model.moe, num_experts=32, top_k=4, ffn_size=48, shared_ffn_size=48)
    model = replace(demo.model, hidden_size=96, num_layers=3, moe=moe, vocab_size=512, num_mtp_heads=0)
    return replace(demo, model=model, stages={"only": stage})


def train(balance: BalanceConfig, steps: int) -> Curves:
    """A run of so many steps."""
    keep_heap()
    torch.set_num_threads(1)
    chosen, device = recipe(balance, steps), torch.device("cpu")
    stage, curves = chosen.stages["only"], Curves()
    with process_group(device, chosen.run.timeout_s):
        meshes = meshes_over(next(iter(launched_layouts(chosen).values())), device, chosen.run.timeout_s)
        engine = build_engine(chosen, meshes, device)
        engine.network.apply_stage(stage, num_groups=1)
        watches = []
        for moe in engine.network.moe_layers().values():
            moe.observer = watch = Watch()
            watches.append(watch)
        for step in range(steps):
            whole = skewed_rows(chosen, step)
            cuts = [slice(i, i + MICRO_BATCH) for i in range(0, ROWS, MICRO_BATCH)]
            rows = [Rows.unweighted(whole.rows.tokens_BS[c], whole.rows.documents_BS[c]) for c in cuts]
            batches = [Batch(row, whole.sources[c]) for row, c in zip(rows, cuts, strict=True)]
            settings = step_settings(stage, step * ROWS * T, ROWS, chosen.optim.clip_norm)
            result = train_step(engine, step_batch(batches, T, meshes, device), settings, Lenient(), TokenLoss())
            curves.loss.append(result.terms["loss"])
            curves.expert_vio.append(float(violation(result.expert_counts_LE).mean()))
            groups_LG = result.expert_counts_LE.unflatten(1, (GROUPS, -1)).sum(2)
            curves.group_vio.append(float(violation(groups_LG).mean()))
            curves.worst_group.append(max(watch.take() for watch in watches))
    return curves


def show(curves: dict[str, Curves]) -> None:
    """The table."""
    table = Table(
        title=f"32 experts, 4 a token, {GROUPS} groups; "
        f"{len(next(iter(curves.values())).loss)} steps of {ROWS} × {T} tokens"
    )
    for column in ("balanced by", "MaxVio by expert", "MaxVio by group", "worst group of a micro-batch", "loss"):
        table.add_column(column, justify="left" if column == "balanced by" else "right")
    for name, c in curves.items():
        figures = (c.end("expert_vio"), c.end("group_vio"), c.end("worst_group"), c.end("loss"))
        table.add_row(name, *(f"{figure:.2f}" for figure in figures))
    Console(width=110).print(table)


def plot(curves: dict[str, Curves], path: Path) -> None:
    """Four panels, a line a way."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    titles = {
        "expert_vio": "MaxVio by expert (global batch)",
        "group_vio": "MaxVio by EP group (global batch)",
        "worst_group": "worst EP rank's load in a micro-batch ÷ fair share",
        "loss": "loss",
    }
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for (name, title), axis in zip(titles.items(), axes.flat, strict=True):
        for (way, c), colour in zip(curves.items(), ("#c0392b", "#e69f00", "#0072b2"), strict=True):
            axis.plot(getattr(c, name), label=way, color=colour, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0, 1].axhline(WORST_GROUP - 1, color="grey", linestyle=":", linewidth=1)
    axes[0, 0].axhline(MAX_VIO, color="grey", linestyle=":", linewidth=1)
    axes[0, 0].legend(fontsize=9)
    figure.savefig(path)


def main() -> int:
    """Print the table and the goals met; 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--plot", type=Path, help="write the curves there")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        done = pool.map(train, WAYS.values(), [arguments.steps] * len(WAYS))
        curves = dict(zip(WAYS, done, strict=True))
    show(curves)
    if arguments.plot:
        plot(curves, arguments.plot)
    nothing, _, both = curves.values()
    goals = [
        both.end("group_vio") <= WORST_GROUP - 1,
        nothing.end("group_vio") >= 2 * (WORST_GROUP - 1),
        both.end("expert_vio") < MAX_VIO,
        nothing.end("expert_vio") >= 2 * MAX_VIO,
    ]
    print(f"goals: {sum(goals)} of {len(goals)} met")
    return 0 if all(goals) else 1


if __name__ == "__main__":
    sys.exit(main())
