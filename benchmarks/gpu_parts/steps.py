"""Parity of training: three steps of a small model with everything on, beside the naive run in float64.

The naive run (tests/naive_step.py) takes initial weights and rows, and nothing else of the package: one document, one
head and one token's experts at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from naive_step import NaiveRun, NaiveStep  # pyright: ignore[reportMissingImports]  (tests)
from tiny import tiny_recipe  # pyright: ignore[reportMissingImports]  (tests)
from torch import Tensor

from gpu_parts.rows import BOUNDS, Given, Row, error, guarded, judged
from steptron.config.schema import LimitsConfig, LrConfig, OptimConfig, Precision, Recipe
from steptron.data.loader import Batch
from steptron.model.heads import TokenLoss
from steptron.model.init import initialise
from steptron.model.inputs import Rows
from steptron.model.transformer import Transformer
from steptron.nn.to_local import local
from steptron.parallel.mesh import Meshes
from steptron.train.batch import step_batch, step_settings
from steptron.train.engines import Engine, build_engine
from steptron.train.process_group import launched_layouts, meshes_over, process_group
from steptron.train.step import Lenient, StepResult, train_step

EngineName = Literal["native", "deepspeed"]
STEPS, ROWS = 3, 4
TIMEOUT_S = 60.0
NUMBERS = ("loss", "mtp_loss", "balance_loss", "total_loss", "grad_norm")
NEAR_TIE = 1e-5
"""The least distance of scores that must keep their order in fp32."""
CHANGE = {"cpu": 1e-3, "cuda": 0.3}
"""The largest error of the change of a weight. Muon's products are fp16 on CUDA, and make singular vectors of small
values as large as the others: with products rounded to fp16 on a CPU, the error is 0.02 to 0.10."""


def small_recipe(precision: Precision, device: str, engine: EngineName = "native") -> Recipe:
    """Return a recipe of three steps with MTP, limits, all balance losses, clipping, Muon and AdamW."""
    tiny = tiny_recipe(Path("corpus"), Path("run"))
    stage = replace(
        tiny.stages["base"],
        tokens=STEPS * ROWS * 32,
        lr=LrConfig(peak=4e-3),
        limits=LimitsConfig(routed={2: 0.3}, shared={1: 0.2}),
    )
    return replace(
        tiny,
        precision=precision,
        engine=engine,
        run=replace(tiny.run, device=device, timeout_s=TIMEOUT_S),
        model=replace(tiny.model, init_std=0.15),
        stages={"base": stage},
        optim=OptimConfig(clip_norm=0.7, matrix_optimizer="muon" if engine == "native" else "adamw"),
    )


def random_rows(recipe: Recipe, step: int, documents: tuple[int, int] = (2, 3)) -> Rows:
    """Return random tokens, weighted as targets with 0, 1 and 3. `documents`: their numbers in even and odd rows."""
    stage, generator = next(iter(recipe.stages.values())), torch.Generator().manual_seed(100 + step)
    shape = stage.batch_size, stage.seq_len + 1 + recipe.model.num_mtp_heads
    rows = Rows.unweighted(
        torch.randint(recipe.model.vocab_size, shape, generator=generator),
        torch.stack([torch.arange(shape[1]) * documents[n % 2] // shape[1] for n in range(shape[0])]).int(),
    )
    weights = torch.tensor([0.0, 1.0, 1.0, 3.0])[torch.randint(4, shape, generator=generator)]
    return replace(rows, weights_BS=weights)


def some_rows(rows: Rows, chosen: slice) -> Rows:
    """Return some of these rows."""
    return Rows(
        tokens_BS=rows.tokens_BS[chosen],
        documents_BS=rows.documents_BS[chosen],
        weights_BS=rows.weights_BS[chosen],
        constants_KBS=rows.constants_KBS[:, chosen],
    )


@dataclass(frozen=True)
class Small:
    """A small run on one rank."""

    recipe: Recipe
    engine: Engine
    meshes: Meshes
    device: torch.device
    documents: tuple[int, int] = (2, 3)
    """The numbers of documents of even and odd rows."""

    def step(self, number: int) -> StepResult:
        """Take step `number`, counted from 0."""
        stage = next(iter(self.recipe.stages.values()))
        rows, size = random_rows(self.recipe, number, self.documents), stage.micro_batch
        parts = [some_rows(rows, slice(first, first + size)) for first in range(0, stage.batch_size, size)]
        batches = [Batch(part, ("prose",) * size) for part in parts]
        batch = step_batch(batches, stage.seq_len, self.meshes, self.device)
        done = number * stage.batch_size * stage.seq_len
        settings = step_settings(stage, done, stage.batch_size, self.recipe.optim.clip_norm)
        return train_step(self.engine, batch, settings, Lenient(), TokenLoss())

    def weights(self) -> dict[str, Tensor]:
        """Return copies of parameters and router biases on the CPU, by name."""
        return {name: local(t).detach().cpu().clone() for name, t in self.engine.network.state().items()}


@contextmanager
def group_of_one(given: Given) -> Iterator[torch.device]:
    """Make a process group of this process, and yield the device."""
    device = torch.device(given.device)
    with process_group(device, TIMEOUT_S):
        yield device


def build(recipe: Recipe, device: torch.device, documents: tuple[int, int] = (2, 3)) -> Small:
    """Build the run in the process group of this process."""
    meshes = meshes_over(next(iter(launched_layouts(recipe).values())), device, TIMEOUT_S)
    engine = build_engine(recipe, meshes, device)
    engine.network.apply_stage(next(iter(recipe.stages.values())), num_groups=1)
    return Small(recipe, engine, meshes, device, documents)


@contextmanager
def small_run(given: Given, precision: Precision, engine: EngineName = "native") -> Iterator[Small]:
    """Build the small run."""
    with group_of_one(given) as device:
        yield build(small_recipe(precision, given.device, engine), device)


def naive_steps(recipe: Recipe) -> list[NaiveStep]:
    """Return the naive run's steps, from the same initial weights and rows."""
    model = Transformer(recipe.model)
    initialise(model, recipe.seed, recipe.model.init_std)
    parameters = dict(model.named_parameters())
    weights = {n: t.detach().double().requires_grad_(n in parameters) for n, t in model.state_dict().items()}
    run = NaiveRun(recipe=recipe, weights=weights)

    def rows_at(stage: str, samples: range) -> tuple[list, list, list]:
        rows = random_rows(recipe, samples.start // ROWS)
        return rows.tokens_BS.tolist(), rows.documents_BS.tolist(), rows.weights_BS.tolist()

    torch.set_default_dtype(torch.float64)
    try:
        return list(run.steps(rows_at))
    finally:
        torch.set_default_dtype(torch.float32)


def steps(given: Given) -> Iterator[Row]:
    """Yield the errors of each step in fp32, and on CUDA in bf16 too."""
    for precision in given.pick(("fp32", "bf16"), ("fp32",)):
        yield from guarded(f"three steps, {precision}", partial(three_steps, given, precision))


def three_steps(given: Given, precision: Precision, engine: EngineName = "native") -> Iterator[Row]:
    """Yield the error of losses and gradient norm of each step, and in fp32 that of the change of every weight."""
    naive = naive_steps(small_recipe(precision, given.device, engine))
    if (margin := min(step.margin for step in naive)) < NEAR_TIE:
        raise AssertionError(f"a token is at a tie between experts ({margin:.1e}): take other rows")
    with small_run(given, precision, engine) as small:
        before, start = small.weights(), small.weights()
        for number, want in enumerate(naive):
            result = small.step(number)
            found = {**result.terms, "grad_norm": result.grad_norm}
            worst, name = max((abs(found[n] / getattr(want, n) - 1), n) for n in NUMBERS)
            bound = number_bound(given, precision, number)
            yield judged(
                f"step {number + 1}, {precision}: losses and gradient norm", worst, bound, note=f"worst: {name}"
            )
            if precision == "fp32":
                yield _changes(given, number, before, small.weights(), naive, start)
                before = small.weights()


def number_bound(given: Given, precision: Precision, number: int) -> float:
    """Return the largest relative error of a loss: later steps have the error of the weights before them."""
    if precision == "bf16":
        return 3e-2
    return BOUNDS[torch.float32] if number == 0 or not given.cuda else 1e-2


def _changes(
    given: Given,
    number: int,
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    naive: list[NaiveStep],
    start: dict[str, Tensor],
) -> Row:
    """Return the row of the largest error of a weight's change in this step, by norm."""
    earlier = {n: t.double() for n, t in start.items()} if number == 0 else naive[number - 1].weights
    errors = {}
    for name, wanted in naive[number].weights.items():
        got, want = after[name].double() - before[name].double(), wanted - earlier[name]
        errors[name] = error(got.flatten(), want.flatten())
    worst = max(errors, key=lambda name: errors[name])
    return judged(
        f"step {number + 1}: change of every weight", errors[worst], CHANGE[given.device], note=f"worst: {worst}"
    )
