"""Tokens a second of a whole training step, ours beside transformers' `Step3p7TextModel` of the very same shapes.

    python benchmarks/step.py [--rounds N]

Both train on the same random tokens with AdamW, forward to optimizer step, each in a process of its own. Steps are
taken in turn, so that a machine that slows down slows both; the table shows medians and the spread (smallest to
largest) of the rounds. The peak is a square matmul of the same precision, measured in the same run. Ours keeps fp32
master weights and moments always; so does transformers where its weights are float32 (autocast in the bf16 rows, as its
own trainer has it), and there the goals are. The last rows show it with everything in bf16, which halves its memory
traffic and loses small updates. It has no MTP heads and no language-modelling head of its own: ours is run without the
first, theirs gets the second.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from steptron.config.resolve import resolve
from steptron.config.schema import Precision, Recipe
from steptron.data.loader import Batch
from steptron.model.flops import flops_per_token
from steptron.model.heads import TokenLoss
from steptron.model.hf_config import config_values, released_stage
from steptron.model.inputs import Rows
from steptron.train.batch import step_batch
from steptron.train.engines import build_engine
from steptron.train.peak_flops import measure_matmul
from steptron.train.process_group import launched_layouts, meshes_over, process_group
from steptron.train.step import Lenient, StepSettings, train_step

ROWS: tuple[tuple[Precision, torch.dtype, float | None], ...] = (
    ("fp32", torch.float32, 2.5),
    ("bf16", torch.float32, 3.0),
    ("bf16", torch.bfloat16, None),
)
"""(precision of the products, transformers' weights and moments, goal as a multiple of its tokens a second)."""
SHAPES = ((1024, 2), (4096, 1))
"""(tokens a sequence, sequences a step)."""
LR = 1e-4


def main() -> int:
    """Print the table and the goals met; 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    table = Table(title="training step of step3p5_mini's shapes, tokens/s: median (smallest to largest)")
    for column in ("T × B", "products", "steptron", "transformers", "its weights", "ratio", "goal", "share of peak"):
        table.add_column(column, justify="right")
    wanted = met = 0
    for precision, weights, goal in ROWS:
        for T, B in SHAPES:
            ours, theirs, peak, flops = compare(precision, weights, T, B, rounds)
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            wanted += goal is not None
            met += goal is not None and ratio >= goal
            share = statistics.median(ours) * flops / peak
            figures = (_spread(ours), _spread(theirs), str(weights).removeprefix("torch."))
            table.add_row(f"{T} × {B}", precision, *figures, f"{ratio:.2f}", f"{goal or '–'}", f"{share:.0%}")
    Console(width=130).print(table)
    print(f"goals: {met} of {wanted} met")
    return 0 if met == wanted else 1


def compare(
    precision: Precision, weights: torch.dtype, T: int, B: int, rounds: int
) -> tuple[list[float], list[float], float, float]:
    """Tokens a second of each round of both, the matmul peak and operations a token."""
    rival = partial(transformers_step, weights=weights)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ours, theirs, peaks = [], [], []
    with Worker(our_step, precision, T, B) as us, Worker(rival, precision, T, B) as them:
        for round_ in range(rounds + 1):
            seconds_ours, seconds_theirs = us.time_step(), them.time_step()
            if round_ > 0:  # the first one warms both up
                ours.append(T * B / seconds_ours)
                theirs.append(T * B / seconds_theirs)
                peaks.append(measure_matmul(dtype))
    return ours, theirs, statistics.median(peaks), flops_per_token(mini(precision).model, T)


class Worker:
    """One contestant in a process of its own, which steps when it is asked to; neither runs with the other's
    allocator settings."""

    def __init__(
        self, make: Callable[[Recipe, torch.Tensor], AbstractContextManager], precision: Precision, T: int, B: int
    ):
        context = multiprocessing.get_context("spawn")
        self._pipe, self._other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._other_end, make, precision, T, B))

    def __enter__(self) -> "Worker":
        self._process.start()
        self._other_end.close()  # so that a worker that dies is an end of file here, not a wait for ever
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process.is_alive():
            self._pipe.send(False)
        self._process.join()

    def time_step(self) -> float:
        """Seconds of one step."""
        self._pipe.send(True)
        return self._pipe.recv()


def _serve(
    pipe, make: Callable[[Recipe, torch.Tensor], AbstractContextManager], precision: Precision, T: int, B: int
) -> None:
    recipe = mini(precision)
    torch.manual_seed(0)
    with make(recipe, torch.randint(recipe.model.vocab_size, (B, T + 1))) as step:
        while pipe.recv():
            start = time.perf_counter()
            step()
            pipe.send(time.perf_counter() - start)


def mini(precision: Precision) -> Recipe:
    """The recipe without MTP heads, which transformers' model does not have."""
    recipe = resolve("step3p5_mini", [f"precision={precision}", "optim.matrix_optimizer=adamw"])
    return replace(recipe, model=replace(recipe.model, num_mtp_heads=0))


@contextmanager
def our_step(recipe: Recipe, tokens_BS: torch.Tensor) -> Iterator[Callable[[], object]]:
    """A function that takes one step of ours: the loop's own `train_step` on the model that it would build."""
    B, S = tokens_BS.shape
    batch = Batch(Rows.unweighted(tokens_BS, torch.zeros_like(tokens_BS, dtype=torch.int32)), ("random",) * B)
    settings = StepSettings(
        seq_len=S - 1,
        batch_size=B,
        lr=LR,
        bias_rate=1e-3,
        mtp_weight=0.0,
        clip_norm=1.0,
    )
    device = torch.device("cpu")
    with process_group(device, recipe.run.timeout_s):
        meshes = meshes_over(next(iter(launched_layouts(recipe).values())), device, recipe.run.timeout_s)
        engine = build_engine(recipe, meshes, device)
        engine.network.apply_stage(next(iter(recipe.stages.values())), num_groups=1)
        loss = TokenLoss()
        yield lambda: train_step(engine, step_batch([batch], S - 1, meshes, device), settings, Lenient(), loss)


@contextmanager
def transformers_step(recipe: Recipe, tokens_BS: torch.Tensor, weights: torch.dtype) -> Iterator[Callable[[], object]]:
    """A function that takes one step of transformers' model with a head, AdamW and the same clipping.

    `weights`: type of parameters and moments; fp32 in a bf16 row means autocast, as transformers' own trainer
    has it."""
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
    from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

    stage = next(iter(recipe.stages.values()))
    config = Step3p7TextConfig(**config_values(recipe.model, released_stage(stage), recipe.precision))
    body = Step3p7TextModel(config).train()
    head = torch.nn.Linear(recipe.model.hidden_size, recipe.model.vocab_size, bias=False)
    parameters = [*body.parameters(), *head.parameters()]
    for parameter in parameters:
        parameter.data = parameter.data.to(weights)
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    inputs, targets = tokens_BS[:, :-1], tokens_BS[:, 1:].flatten()
    autocast = recipe.precision == "bf16" and weights is torch.float32

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = body(input_ids=inputs, use_cache=False).last_hidden_state
            logits = head(hidden)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    yield step


def _spread(rates: list[float]) -> str:
    return f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"


if __name__ == "__main__":
    sys.exit(main())
