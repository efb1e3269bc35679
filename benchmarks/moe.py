"""Tokens a second of one MoE layer, forward and backward, ours beside transformers' block and beside a dense product.

    python benchmarks/moe.py [--rounds N] [--shape D,I,E,K]

A layer is router, routed experts and one shared expert as wide as a routed one. All contestants get the same weights,
the same 4,096 tokens and the same selection bias; their fp32 results and gradients of the input are compared while
warming up. The bias is moved by signs, as training does it: towards even counts ("uniform"), or towards counts that
fall as 1/rank, none above the number of tokens ("zipf").

    ours          `MoeLayer` as training runs it here
    observed      the same with an observer, which sees every statistic there is
    NAME          `MoeLayer` with that back end of the experts
    hf-NAME       transformers' `Step3p7SparseMoeBlock` with the expert implementation NAME. As released it has only
                  `eager`; transformers' own decorator gives it the others
    loop          our layer with a loop over the experts and autograd's own backward
    floor         x [M, D] · [D, 3I] and the two products of its backward, each by the library that is faster at it

Every timed pass follows one of the same contestant. All run in this process, with the allocator settings of a training
run (`keep_heap`), from which transformers gains too. They take turns in every round, one load after the other, so that
a machine that slows down slows all of them. A ratio is the median of the rounds' ratios. Who is four times slower than
ours in the second of two warm-up passes is not asked again (the best of transformers always is); that pass is its
figure. Eight times slower, and the first pass of the first load has to do. `batched_mm` copies an expert's weights for
each choice of a token, so it gets only as many tokens as `COPIES_BYTES` allow. On a busy machine set
OMP_WAIT_POLICY=passive, or threads that wait for each other take most of the time.

The floor's share compares operations a second; the layer's are those of router, routed experts and shared expert,
without padding. In bf16, parameters and activations are bf16 on both sides; our router computes its logits in fp32,
transformers' in bf16.

Legend: B = 1 row, T tokens, N = B·T, D hidden, I expert FFN, F = 3·I, E experts, K choices a token, M = N·K, R rows of
an expert.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from steptron.config.schema import MoeConfig
from steptron.moe.dispatch import count_tokens
from steptron.moe.experts import Experts, make_backend
from steptron.moe.layer import MoeLayer
from steptron.moe.stats import Observation
from steptron.nn.matmul import matmul_nt
from steptron.train.device import keep_heap

TOKENS = 4096
COPIES_BYTES = 2**30
"""What `batched_mm` may copy in one forward pass; its backward makes as much again."""
FAR_SLOWER, HOPELESS = 4.0, 8.0
OURS = "ours"
LOADS = ("uniform", "zipf")
SKEW_GOAL = 1.3  # the skewed load's time over the uniform one's, at most
OBSERVED, OBSERVED_GOAL = "observed", 1.03  # the time with an observer over that without one, at most
NOT_RUN = {"deepgemm": "its kernels need CUDA", "sonicmoe": "its kernels need CUDA"}
"""Expert implementations of transformers that cannot run here, and why."""


class Shape(NamedTuple):
    """Sizes of a layer, by the legend's letters."""

    D: int
    I: int
    E: int
    K: int

    def flops(self) -> int:
        """Operations of all products of the layer, forward and backward: router, routed experts, shared expert."""
        return 6 * TOKENS * self.D * (3 * self.I * (self.K + 1) + self.E)


SHAPES = (Shape(512, 256, 64, 8), Shape(1024, 160, 288, 8), Shape(256, 512, 8, 2))
GOALS = {torch.float32: ("fp32", 1.25, 0.7), torch.bfloat16: ("bf16", 2.0, 0.5)}
"""Name; multiple of the tokens a second of the best of transformers' implementations; share of the floor's
operations a second."""


class Contestant(NamedTuple):
    """One way to compute the layer, with what it is asked to compute."""

    name: str
    forward: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    x_BTD: Tensor
    grad_BTD: Tensor

    def run(self) -> tuple[Tensor, Tensor]:
        """The layer's result and the gradient of its input. The parameters' gradients are computed too, and dropped."""
        y_BTD = self.forward(self.x_BTD)
        return y_BTD.detach(), torch.autograd.grad(y_BTD, (self.x_BTD, *self.parameters), self.grad_BTD)[0]

    def rate(self) -> float:
        """Tokens a second of one pass forward and backward."""
        return self.x_BTD.shape[1] / _seconds(self.run)


class Watch:
    """An observer that does nothing with what it sees."""

    def observe(self, seen: Observation) -> None:
        pass


class LoopExperts(Experts):
    """The experts one after the other, as one would first write it."""

    def forward(
        self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, with_stats: bool = False
    ) -> tuple[Tensor, None]:
        y_ND = torch.zeros_like(x_ND)
        # `unbind` has one backward for all experts; indexing would fill, for each, a gradient as large as all of them.
        stacks = zip(self.w_gate.unbind(0), self.w_up.unbind(0), self.w_down.unbind(0), strict=True)
        for expert, (gate_ID, up_ID, down_DI) in enumerate(stacks):
            tokens_R, choices_R = torch.where(experts_NK == expert)
            x_RD = x_ND.index_select(0, tokens_R)
            h_RI = F.silu(F.linear(x_RD, gate_ID)) * F.linear(x_RD, up_ID)
            h_RI = h_RI * weights_NK[tokens_R, choices_R, None].to(h_RI.dtype)
            y_ND.index_add_(0, tokens_R, F.linear(h_RI, down_DI))
        return y_ND, None


class Bench:
    """The contestants of one shape and precision."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        config = MoeConfig(num_experts=shape.E, top_k=shape.K, ffn_size=shape.I, shared_ffn_size=shape.I)
        layer = MoeLayer(shape.D, config)
        x_BTD, grad_BTD = torch.randn(2, 1, TOKENS, shape.D).unbind(0)
        # From fp32 values whatever the precision, so that both precisions route alike but for a few ties.
        probabilities_TE = torch.sigmoid(x_BTD[0] @ layer.router.weight.detach().mT)
        self.bias = {load: calibrate(probabilities_TE, target_counts(load, shape), shape.K) for load in LOADS}
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(dtype)
        self.shape, self.dtype, self.layer = shape, dtype, layer
        self._x_BTD, self._grad_BTD = x_BTD.to(dtype), grad_BTD.to(dtype)
        ours = self._contestant(OURS, lambda x_BTD: layer(x_BTD)[0], layer)
        observed = self._contestant(OBSERVED, self._observed, layer)
        self.contestants = [ours, observed, *self._transformers(), *self._variants(config)]
        M, width = TOKENS * shape.K, 3 * shape.I
        self._floor = [torch.randn(*size).to(dtype) for size in ((M, shape.D), (shape.D, width), (M, width))]

    def set_load(self, load: str) -> float:
        """Set the router bias of this load, which all contestants share. Return the busiest expert's tokens ÷ the
        mean."""
        self.layer.router.bias.copy_(self.bias[load])
        with torch.no_grad():
            counts_E = count_tokens(self.layer.router(self._x_BTD[0]).experts_NK, self.shape.E)
        return counts_E.max().item() / counts_E.double().mean().item()

    def floor_flops(self) -> float:
        """Operations a second of the dense product and the two of its backward, each by the library that is
        faster at it."""
        x_MD, w_DF, grad_MF = self._floor
        products: list[Callable] = [torch.mm]
        if self.dtype is torch.float32:  # in bf16 both are one and the same
            products.append(lambda a_MK, b_KN: matmul_nt(a_MK, b_KN.mT))
        pairs = ((x_MD, w_DF), (grad_MF, w_DF.mT), (x_MD.mT, grad_MF))
        seconds = sum(min(_seconds(product, *pair) for product in products) for pair in pairs)
        return 6 * x_MD.shape[0] * w_DF.numel() / seconds

    def _contestant(self, name: str, forward: Callable, module: nn.Module, tokens: int = TOKENS) -> Contestant:
        x_BTD = self._x_BTD[:, :tokens].clone().requires_grad_()
        return Contestant(name, forward, list(module.parameters()), x_BTD, self._grad_BTD[:, :tokens])

    def _observed(self, x_BTD: Tensor) -> Tensor:
        self.layer.observer = Watch()
        y_BTD, _ = self.layer(x_BTD)
        self.layer.observer = None
        return y_BTD

    def _variants(self, config: MoeConfig) -> Iterator[Contestant]:
        """Our layer with other experts on the same weights."""
        for name in ("grouped", "batched", "loop"):
            kind = LoopExperts if name == "loop" else Experts
            with torch.device("meta"):  # all its tensors are replaced
                layer = MoeLayer(self.shape.D, config)
                experts = kind(self.shape.E, self.shape.D, self.shape.I)
            layer.router, layer.shared, layer.experts = self.layer.router, self.layer.shared, experts
            for weight, parameter in self.layer.experts.named_parameters():
                setattr(experts, weight, parameter)
            if name != "loop":
                experts.backend = make_backend(name)
            yield self._contestant(name, lambda x_BTD, layer=layer: layer(x_BTD)[0], layer)

    def _transformers(self) -> Iterator[Contestant]:
        """Transformers' block on the same weights; gate and up are stacked there, and therefore copied."""
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

        D, I, E, K = self.shape
        one_layer: dict = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "mlp_layer_types": ["sparse"]}
        widths: dict = {"hidden_size": D, "moe_intermediate_size": I, "share_expert_dim": I}
        config = Step3p7TextConfig(n_routed_experts=E, num_experts_per_tok=K, **widths, **one_layer)
        with torch.device("meta"):  # all its tensors are replaced
            block: Any = _block_class()(config, 0)
        ours = self.layer
        block.gate.weight, block.gate.e_score_correction_bias = ours.router.weight, ours.router.bias
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(block.shared_experts, name).weight = getattr(ours.shared, name).weight
        stacked = torch.cat((ours.experts.w_gate.detach(), ours.experts.w_up.detach()), dim=1)
        block.experts.gate_up_proj, block.experts.down_proj = nn.Parameter(stacked), ours.experts.w_down

        def forward(x_BTD: Tensor, name: str) -> Tensor:
            config._experts_implementation = name
            return block(x_BTD)

        few = COPIES_BYTES // (K * 3 * I * D * stacked.element_size())
        for name in ("eager", *(name for name in ALL_EXPERTS_FUNCTIONS if name not in NOT_RUN)):
            tokens, note = (few, f" ({few} tokens)") if name == "batched_mm" else (TOKENS, "")
            yield self._contestant(f"hf-{name}{note}", lambda x_BTD, name=name: forward(x_BTD, name), block, tokens)


@cache
def _block_class() -> type[nn.Module]:
    """Transformers' block, whose experts follow `config._experts_implementation` once they are decorated (in place)."""
    from transformers.integrations.moe import use_experts_implementation
    from transformers.models.step3p7 import modeling_step3p7 as modeling

    use_experts_implementation(modeling.Step3p7Experts)
    return modeling.Step3p7SparseMoeBlock


def _seconds(function: Callable, *args: Tensor) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def target_counts(load: str, shape: Shape) -> Tensor:
    """Tokens by expert [E] that the load aims at, in random order; they add up to M."""
    total = TOKENS * shape.K
    if load == "uniform":
        return torch.full((shape.E,), total / shape.E)
    share_E = 1 / torch.arange(1, shape.E + 1)
    full = 0  # experts that every token goes to
    while share_E[full] / share_E[full:].sum() * (total - full * TOKENS) > TOKENS:
        full += 1
    counts_E = share_E / share_E[full:].sum() * (total - full * TOKENS)
    return counts_E.clamp(max=TOKENS)[torch.randperm(shape.E)]


def calibrate(probabilities_TE: Tensor, target_E: Tensor, top_k: int, steps: int = 400) -> Tensor:
    """The selection bias under which the counts are about `target_E`: bias += rate · sign(target − count), at a
    falling rate."""
    bias_E = torch.zeros_like(target_E)
    for step in range(steps):
        counts_E = torch.bincount((probabilities_TE + bias_E).topk(top_k).indices.flatten(), minlength=len(bias_E))
        bias_E += 0.1 * 0.98**step * torch.sign(target_E - counts_E)
    missed = (target_E - counts_E).abs().sum() / target_E.sum()
    assert missed < 0.05, f"{missed:.1%} of the choices are not where the load wants them"
    # The search ends with tokens at ties, which each library's last bits would decide differently.
    return bias_E + 1e-4 * torch.randn(len(bias_E))


class Figures(NamedTuple):
    """Tokens a second by load, contestant and round; the floor's operations a second by round; by load, busiest
    expert ÷ mean."""

    rates: dict[str, dict[str, list[float]]]
    floors: list[float]
    busiest: dict[str, float]


def check(name: str, ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Raise `AssertionError` where a contestant does not compute what ours does, but for one token in a thousand at
    a tie."""
    for what, a_BTD, b_BTD in zip(("result", "gradient"), ours, theirs, strict=True):
        a_TD, b_TD = a_BTD[0, : b_BTD.shape[1]], b_BTD[0]
        share = ((a_TD - b_TD).norm(dim=1) > 1e-4 * a_TD.norm(dim=1)).double().mean().item()
        assert share <= 1e-3, f"{name}: {what} of {share:.1%} of the tokens is not ours"


def measure(shape: Shape, dtype: torch.dtype, rounds: int) -> Figures:
    """Warm up, drop who is far slower, and let the others take turns."""
    bench = Bench(shape, dtype)
    bench.floor_flops()
    figures, running, hopeless = Figures({}, [], {}), {}, {}
    for load in LOADS:
        figures.busiest[load] = bench.set_load(load)
        ours, first = bench.contestants[0].run(), dict(hopeless)
        for contestant in (contestant for contestant in bench.contestants if contestant.name not in hopeless):
            start = time.perf_counter()
            theirs = contestant.run()
            rate = contestant.x_BTD.shape[1] / (time.perf_counter() - start)
            if dtype is torch.float32:
                check(contestant.name, ours, theirs)
            if rate * HOPELESS < first.get(OURS, 0.0):
                hopeless[contestant.name] = first[contestant.name] = rate
            else:
                first[contestant.name] = contestant.rate()
        stays = {name for name, rate in first.items() if rate * FAR_SLOWER >= first[OURS]} | {_best_rival(first)}
        running[load] = [contestant for contestant in bench.contestants if contestant.name in stays]
        figures.rates[load] = {name: [] if name in stays else [rate] for name, rate in first.items()}
    for _ in range(rounds):
        for load in LOADS:
            bench.set_load(load)
            for contestant in running[load]:
                contestant.run()  # whose memory the one before has pushed out of the caches
                figures.rates[load][contestant.name].append(contestant.rate())
        figures.floors.append(bench.floor_flops())
    return figures


def _best_rival(rates: dict[str, float]) -> str:
    return max((who for who in rates if who.startswith("hf-")), key=lambda who: rates[who])


def add_rows(table: Table, shape: Shape, dtype: torch.dtype, figures: Figures) -> list[bool]:
    """Add a row a load, print what all contestants reached, and return whether each goal is met."""
    met: list[bool] = []

    def judge(value: float, goal: float, at_most: bool = False) -> str:
        met.append(value <= goal if at_most else value >= goal)
        return f"{value:.2f} ({'≤' if at_most else '≥'} {goal}){'' if met[-1] else ' missed'}"

    (precision, rival_goal, floor_goal), ours = GOALS[dtype], {load: figures.rates[load][OURS] for load in LOADS}
    for load, rates in figures.rates.items():
        name = f"{','.join(map(str, shape))} {precision} {load}"
        best = _best_rival({who: statistics.median(rate) for who, rate in rates.items()})
        ratio, share, skew, observed = judge(_ratio(ours[load], rates[best]), rival_goal), "", "", ""
        if load == "uniform":
            share = judge(_ratio([rate * shape.flops() / TOKENS for rate in ours[load]], figures.floors), floor_goal)
            observed = judge(_ratio(ours[load], rates[OBSERVED]), OBSERVED_GOAL, at_most=True)
        else:
            skew = judge(_ratio(ours["uniform"], ours[load]), SKEW_GOAL, at_most=True)
        rival = f"{_spread(rates[best])} {best.removeprefix('hf-')}"
        table.add_row(name, f"{figures.busiest[load]:.1f}", _spread(ours[load]), rival, ratio, share, skew, observed)
        once = {who: "*" if len(rate) < len(figures.floors) else "" for who, rate in rates.items()}
        all_of_them = ", ".join(f"{who} {statistics.median(rate):.0f}{once[who]}" for who, rate in rates.items())
        print(f"{name}: {all_of_them}; floor {statistics.median(figures.floors) / 1e9:.0f} GFLOP/s", flush=True)
    return met


def _ratio(a: list[float], b: list[float]) -> float:
    """Median of the rounds' a ÷ b; who has one figure only has it in every round."""
    return statistics.median(x / y for x, y in zip(a, b if len(b) > 1 else b * len(a), strict=True))


def _spread(rates: list[float]) -> str:
    return f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"


def main() -> int:
    """Print the table and the goals met; 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", type=lambda text: Shape(*map(int, text.split(","))), help="only this one: D,I,E,K")
    arguments = parser.parse_args()
    keep_heap()
    table = Table(title="one MoE layer, forward and backward, tokens/s: median (smallest to largest)")
    for (
        column
    ) in "D,I,E,K|busiest ÷ mean|steptron|best of transformers|ratio|of floor|÷ uniform's time|observed ÷ not".split(
        "|"
    ):
        table.add_column(column, justify="right")
    print("tokens/s of all (median; *: far slower, one pass only)")
    met: list[bool] = []
    for shape in [arguments.shape] if arguments.shape else SHAPES:
        for dtype in GOALS:
            met += add_rows(table, shape, dtype, measure(shape, dtype, arguments.rounds))
    print("not run:", "; ".join(f"hf-{name}, {reason}" for name, reason in NOT_RUN.items()))
    Console(width=190).print(table)
    print(f"goals: {sum(met)} of {len(met)} met")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
