"""A few training steps of a small recipe on random tokens, through the real training code, with a record of each step.

    rows by index ─ step_batch ─► train_step ─► Record: losses, norm, expert counts, biases, sizes of outputs,
                                                        this rank's pieces of gradients and parameters

Rows are a function of the seed and their index, so that any layout reads the same global batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn

from steptron.checkpoint.load import load
from steptron.checkpoint.retention import Retention
from steptron.checkpoint.save import save
from steptron.checkpoint.staging import pieces_of
from steptron.config.schema import Recipe, trained_heads
from steptron.data.loader import Batch
from steptron.model.heads import TokenLoss
from steptron.model.inputs import Rows
from steptron.moe.layer import MoeLayer
from steptron.moe.router import Router
from steptron.moe.stats import MoeObserver, Observation
from steptron.monitor.statistics.registry import Registry
from steptron.nn.attention import Attention
from steptron.nn.embedding import Embedding
from steptron.nn.mlp import GatedMLP
from steptron.nn.shard_geometry import Rectangle, rectangle
from steptron.nn.to_local import local
from steptron.optim.optimizer import build_optimizer
from steptron.parallel.apply import build_network
from steptron.parallel.collectives import run_on_all_ranks
from steptron.parallel.mesh import Meshes, data_rank
from steptron.parallel.network import Network
from steptron.parallel.objective import Objective
from steptron.train.batch import row_ranges, step_batch, step_settings
from steptron.train.engines.native import NativeEngine
from steptron.train.instrumentation import Instruments, watch_network
from steptron.train.process_group import make_coordinator
from steptron.train.step import StepResult, train_step


@dataclass(frozen=True, kw_only=True)
class Record:
    """One step on one rank. Tensors are this rank's pieces, copied."""

    step: int
    """The step, from 1."""
    result: StepResult
    outputs: dict[str, float]
    """The squares of each module's output, summed over this rank's tokens, in the order of the forward pass."""
    margins: dict[str, float]
    """The smallest margin by MoE layer between the last expert that a token here chose and the first that it did not.
    """
    gradients: dict[str, Tensor]
    """The gradients by parameter, before they are clipped."""
    parameters: dict[str, Tensor]
    """The parameters after the step."""
    biases: dict[str, Tensor]
    """The router biases after the step."""
    statistics: Tensor
    """The metrics plane of this rank with every statistic, not summed over ranks."""


@dataclass(kw_only=True)
class Trial:
    """A network and its optimizer under one layout, and its position in the one stage."""

    recipe: Recipe
    meshes: Meshes
    engine: NativeEngine
    step: int = 0
    _gradients: dict[str, Tensor] = field(default_factory=dict)
    _outputs: dict[str, Tensor] = field(default_factory=dict)
    _margins: dict[str, "Margin"] = field(default_factory=dict)
    _seen: Instruments = field(init=False)

    def __post_init__(self) -> None:
        monitor = replace(self.recipe.monitor, level="full")
        longest = max(stage.seq_len for stage in self.recipe.stages.values())
        self._seen = watch_network(monitor, self.meshes, self.network, list(self.recipe.data.sources), longest)
        self.engine.observe(self._seen.updates)

    @property
    def network(self) -> Network:
        """Return the engine's network."""
        return self.engine.network

    @property
    def registry(self) -> Registry:
        """Return the meaning of the statistics in a record."""
        return self._seen.plane.registry

    def see(self, squares_P: Tensor) -> None:
        """Complete the statistics, as the judge of the trial's own steps."""
        self._seen.after_backward(squares_P)

    def forget(self) -> None:
        """Clear the outputs and the statistics of a step that is repeated."""
        self._outputs.clear()
        self._seen.plane.reset()

    def allows(self, result: StepResult) -> bool:
        """Allow every step."""
        return True

    def run(self, steps: int) -> Iterator[Record]:
        """Run the next steps, one by one."""
        (name, stage), device = next(iter(self.recipe.stages.items())), torch.device("cpu")
        self.network.apply_stage(stage, num_groups=self.meshes.layout.expert["ep"])
        rows, ranks = stage.batch_size, self.meshes.layout.data_ranks
        for _ in range(steps):
            ranges = row_ranges(self.step * rows, rows, stage.micro_batch, data_rank(self.meshes), ranks)
            batches = [make_rows(self.recipe, name, indices) for indices in ranges]
            heads = trained_heads(self.recipe.model, stage)
            batch = step_batch(batches, stage.seq_len, self.meshes, device, mtp_heads=heads)
            tokens = self.step * rows * stage.seq_len
            settings = step_settings(stage, tokens, rows, self.recipe.optim.clip_norm)
            self._outputs.clear()
            self._seen.plane.reset()
            result = train_step(self.engine, batch, settings, self, TokenLoss())
            self.step += 1
            yield Record(
                step=self.step,
                result=result,
                margins={n: margin.take() for n, margin in self._margins.items()},
                outputs={n: float(total) for n, total in self._outputs.items()},
                gradients=self._gradients,
                parameters={n: local(p).detach().clone() for n, p in self.network.named_parameters()},
                biases={n: t.clone() for n, t in self.network.state().items() if n.endswith("router.bias")},
                statistics=self._seen.plane.values.clone(),
            )

    def save(self, folder: Path) -> Path:
        """Write a checkpoint, as a run does."""
        layout = {"dense": self.meshes.layout.dense, "expert": self.meshes.layout.expert}
        return save(
            folder,
            step=self.step,
            pieces=pieces_of(self.engine.state()),
            counters={},
            recipe_hash="",
            layout=layout,
            keep=Retention(newest=1),
            coordinator=make_coordinator(),
        )

    def load(self, checkpoint: Path, step: int) -> None:
        """Continue from a checkpoint of that step, of any layout."""
        self.engine.load(lambda tensors: run_on_all_ranks(lambda: load(checkpoint, tensors)))
        self.step = step

    def keep_gradients(self) -> None:
        """Copy every step's gradients between the backward pass and the clip."""
        forward_backward = self.network.forward_backward

        def with_copies(inputs: list, objective: Objective) -> Tensor:
            sums = forward_backward(inputs, objective)
            parameters = dict(self.network.named_parameters())
            self._gradients = {n: local(p.grad).clone() for n, p in parameters.items() if p.grad is not None}
            return sums

        self.network.forward_backward = with_copies

    def keep_outputs(self) -> None:
        """Sum up the squares of each sublayer's output in every forward pass."""
        for name, module in _sublayers(self.network):
            module.register_forward_hook(partial(self._add_output, name))
            if isinstance(module, MoeLayer):
                assert module.observer is not None, "a trial watches every layer"
                self._margins[name] = module.observer = Margin(module.router, module.observer)

    def _add_output(self, name: str, module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        values = output if isinstance(output, Tensor) else output[0]
        self._outputs[name] = self._outputs.get(name, 0.0) + values.detach().double().square().sum()

    def rectangles(self) -> dict[str, Rectangle]:
        """Return this rank's part of each parameter."""
        return {name: rectangle(parameter) for name, parameter in self.network.named_parameters()}


class Margin:
    """An observer of a MoE layer, placed before another one, that keeps the smallest margin of its choices."""

    def __init__(self, router: Router, then: MoeObserver) -> None:
        self._router, self._then, self._least = router, then, inf

    def observe(self, seen: Observation) -> None:
        """Observe one forward pass."""
        routing = seen.routing
        scores_NE = routing.probabilities_NE.detach() + self._router.bias
        others_NE = scores_NE.scatter(1, routing.experts_NK, -inf)
        gaps_N = scores_NE.gather(1, routing.experts_NK).amin(1) - others_NE.amax(1)
        self._least = min(self._least, float(gaps_N.min()))
        self._then.observe(seen)

    def take(self) -> float:
        """Return the smallest margin since the last call."""
        least, self._least = self._least, inf
        return least


def start_trial(recipe: Recipe, meshes: Meshes) -> Trial:
    """Build the recipe's network on these meshes, on the CPU, at step 0."""
    network = build_network(recipe, meshes, torch.device("cpu"))
    fill_vectors(network, 2 * recipe.model.init_std)
    engine = NativeEngine(network, build_optimizer(dict(network.named_parameters()), recipe.optim))
    trial = Trial(recipe=recipe, meshes=meshes, engine=engine)
    trial.keep_gradients()
    trial.keep_outputs()
    return trial


def _sublayers(network: Network) -> Iterator[tuple[str, nn.Module]]:
    """Return embedding, attention and FFN of every layer and MTP head that is here. On each rank they process its own
    tokens."""
    for part in network.parts.values():
        for name, module in part.named_modules():
            if isinstance(module, Embedding | Attention | MoeLayer) or (
                isinstance(module, GatedMLP) and "moe" not in name
            ):
                yield name, module


@torch.no_grad()
def fill_vectors(network: Network, std: float) -> None:
    """Set vectors (norms) to other values than the initial zeros: a zero in a wrong place would not be noticed."""
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            generator = torch.Generator().manual_seed(crc32(name.encode()))
            values = torch.randn(parameter.shape, generator=generator).mul_(std)
            local(parameter).copy_(values[rectangle(parameter).slices])
    network.values_changed()


def make_rows(recipe: Recipe, stage: str, indices: range) -> Batch:
    """Return rows of random tokens with documents of every length, so that borders fall anywhere. Some rows are one
    document."""
    T, lookahead, vocab_size = recipe.stages[stage].seq_len, 1 + recipe.model.num_mtp_heads, recipe.model.vocab_size
    tokens, documents = [], []
    for index in indices:
        generator = torch.Generator().manual_seed((recipe.seed + 1) * 1_000_003 + index)
        tokens.append(torch.randint(vocab_size, (T + lookahead,), generator=generator))
        starts = torch.rand(T + lookahead, generator=generator) < (0.0 if index % 3 == 0 else 4 / T)
        documents.append(starts.cumsum(0).int())
    return Batch(Rows.unweighted(torch.stack(tokens), torch.stack(documents)), ("made up",) * len(tokens))
