"""The same steps under several engines: what the ranks of a test do. Every engine goes one course, and its state is
moved to others."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from steptron.config.schema import (
    DeepSpeedConfig,
    ExpertMeshConfig,
    LrConfig,
    OptimConfig,
    ParallelConfig,
    Recipe,
    RecomputeConfig,
)
from steptron.model.heads import TokenLoss
from steptron.nn.shard_geometry import Rectangle, rectangle
from steptron.nn.to_local import local
from steptron.parallel.mesh import Meshes, build_meshes, data_rank, resolve_layout
from steptron.prove.trial import make_rows
from steptron.train.batch import row_ranges, step_batch, step_settings
from steptron.train.engines import Engine, build_engine
from steptron.train.instrumentation import watch_network
from steptron.train.step import StepBatch, StepResult, train_step
from torch import Tensor

from tiny import tiny_recipe

STEPS, SKIPPED, FROZEN, AFTER = 6, 2, range(4, 6), 2
"""Steps of a course, which one is held back, those with frozen routers, and those that follow a load."""
RECOMPUTED = RecomputeConfig(parts=("attention", "ffn", "silu", "permutation"))
Numbers = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Course:
    """What one rank has seen of an engine's course."""

    numbers: list[Numbers]
    """By step: losses and the gradient's norm."""
    registry: dict
    planes: list[Tensor]
    """The metrics plane by step."""
    state: dict[str, tuple[torch.Size, Rectangle, Tensor]]
    """At the end: shape, this rank's part, its values."""
    read: list[Tensor]
    """Log-probabilities of this rank's rows at the end, which are read before the steps that follow it."""
    onward: list[Numbers]
    """Numbers of the steps after the end; empty where nothing is compared with them, as are the next two of the native
    engine."""
    again: list[Numbers]
    """Of the same steps after a rewind to the end: a backward pass that no update followed, and a load."""
    afresh: list[Numbers]
    """Of the same steps by a new engine that has loaded the state."""
    moved: dict[str, list[Numbers]]
    """Of the same steps by an engine of that name that has loaded the state."""


def case(
    engine: str = "native", zero: int = 2, ep: int = 1, recompute: RecomputeConfig | None = None, **changes
) -> Recipe:
    """Two micro-batches a rank on two ranks; the clip acts; an activation limit bites."""
    recipe = tiny_recipe(Path("unused"), Path("unused"))
    stage = replace(
        recipe.stages["base"],
        lr=LrConfig(peak=3e-3),
        batch_size=8,
        micro_batch=2,
        limits=replace(recipe.stages["base"].limits, routed={1: 0.5}),
    )
    return replace(
        recipe,
        model=replace(recipe.model, num_layers=2),
        stages={"base": stage},
        optim=OptimConfig(matrix_optimizer="adamw", clip_norm=0.5),
        monitor=replace(recipe.monitor, level="full"),
        engine=engine,
        deepspeed=DeepSpeedConfig(zero=zero),  # pyright: ignore[reportArgumentType]
        parallel=ParallelConfig(expert=ExpertMeshConfig(ep=ep), recompute=recompute or RecomputeConfig()),
        **changes,
    )


class Runner:
    """An engine, its metrics, and where it is in the course; the judge of its own steps."""

    def __init__(self, recipe: Recipe, world_size: int):
        self.recipe = recipe
        self.meshes: Meshes = build_meshes(resolve_layout(recipe.parallel, world_size), "cpu")
        self.engine: Engine = build_engine(recipe, self.meshes, torch.device("cpu"))
        self.seen = watch_network(
            recipe.monitor, self.meshes, self.engine.network, list(recipe.data.sources), recipe.stages["base"].seq_len
        )
        self.engine.observe(self.seen.updates)
        self.step = 0

    def see(self, squares_P: Tensor) -> None:
        self.seen.after_backward(squares_P)

    def forget(self) -> None:
        self.seen.plane.reset()

    def allows(self, result: StepResult) -> bool:
        return self.step != SKIPPED

    def run(self) -> Numbers:
        """The next step."""
        stage = self.recipe.stages["base"]
        self.step += 1
        frozen = replace(stage.balance, freeze_router=self.step in FROZEN)
        self.engine.network.apply_stage(replace(stage, balance=frozen), num_groups=1)
        settings = step_settings(stage, 0, stage.batch_size, self.recipe.optim.clip_norm)
        self.seen.plane.reset()
        result = train_step(self.engine, self.batch(), settings, self, TokenLoss())
        assert bool(result.overflow) == (self.recipe.kernels.capacity != "exact"), "a step is repeated, or it is not"
        return *result.terms.values(), result.grad_norm

    def batch(self) -> StepBatch:
        """The rows of this step."""
        stage, ranks = self.recipe.stages["base"], self.meshes.layout.data_ranks
        first, rows = self.step * stage.batch_size, stage.batch_size
        ranges = row_ranges(first, rows, stage.micro_batch, data_rank(self.meshes), ranks)
        batches = [make_rows(self.recipe, "base", indices) for indices in ranges]
        return step_batch(batches, stage.seq_len, self.meshes, torch.device("cpu"))

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the state."""
        return {name: tensor.detach().clone() for name, tensor in self.engine.state().items()}

    def load(self, snapshot: dict[str, Tensor], step: int) -> None:
        """Go on from a snapshot of that step, by any engine of the same layout."""

        @torch.no_grad()
        def read(tensors: dict[str, Tensor]) -> None:
            assert tensors.keys() == snapshot.keys(), tensors.keys() ^ snapshot.keys()
            for name, tensor in tensors.items():
                assert rectangle(tensor) == rectangle(snapshot[name]), name
                local(tensor).copy_(local(snapshot[name]))

        self.engine.load(read)
        self.step = step


def go(recipe: Recipe, world_size: int, others: dict[str, Recipe]) -> Course:
    """The course of one engine; its state is loaded by `others` too, at the end."""
    runner = Runner(recipe, world_size)
    numbers, planes = [], []
    for _ in range(STEPS):
        numbers.append(runner.run())
        planes.append(runner.seen.plane.values.clone())
    end = runner.snapshot()
    read = runner.engine.network.head_log_probs(runner.batch().inputs)
    zero = recipe.engine != "native"
    onward, again = [], []
    if zero or others:
        onward = [runner.run() for _ in range(AFTER)]
    if zero:
        runner.step = SKIPPED - 1
        runner.run()
        runner.load(end, STEPS)
        again = [runner.run() for _ in range(AFTER)]
    return Course(
        numbers=numbers,
        registry=runner.seen.plane.registry.to_dict(),
        planes=planes,
        state={name: (t.shape, rectangle(t), local(t).clone()) for name, t in end.items()},
        read=read,
        onward=onward,
        again=again,
        afresh=_after(recipe, world_size, end) if zero else [],
        moved={name: _after(other, world_size, end) for name, other in others.items()},
    )


def _after(recipe: Recipe, world_size: int, end: dict[str, Tensor]) -> list[Numbers]:
    runner = Runner(recipe, world_size)
    runner.load(end, STEPS)
    return [runner.run() for _ in range(AFTER)]


def go_all(rank: int, world_size: int, cases: dict[str, Recipe], moves: dict[str, list[str]], folder: Path) -> Path:
    """On every rank: all cases; `moves`: by case, which others load its state. Returns a file with its courses by
    case."""
    courses = {}
    for name, recipe in cases.items():
        others = {other: cases[other] for other in moves.get(name, ())}
        courses[name] = go(recipe, world_size, others)
    path = folder / f"rank-{rank}.pt"
    torch.save(courses, path)
    return path
