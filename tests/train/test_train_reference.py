"""Whole runs through `steptron train`, held against the naive run in float64: losses, norms, rates, router biases and
all weights.

On one process the network is put in float64 (`torch.set_default_dtype`); what stays fp32 there are RoPE's tables, the
router bias, the factor of the clip and Polar Express. Under the other layouts it is fp32, as in any run."""

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from steptron.checkpoint.load import load_part
from steptron.cli.main import main
from steptron.config.schema import (
    BalanceConfig,
    CheckpointConfig,
    LimitsConfig,
    LrConfig,
    OptimConfig,
    RampStep,
    Recipe,
    RopeScalingConfig,
    StageConfig,
)
from steptron.model.init import initialise
from steptron.model.transformer import Transformer
from steptron.monitor.statistics.weights import EXPERT_MATRICES
from steptron.monitor.storage.store import connect
from steptron.train.run import open_loader
from torch.distributed import TCPStore

from changed_samples import Drawn, changed_samples
from naive_step import NaiveRun, NaiveStep, Rows
from ranks import run_processes
from small_runs import metrics, steptron, write_recipe
from tiny import tiny_recipe

pytestmark = pytest.mark.takes(60)

RANKS = 2
LAYOUTS = {
    "dp": ["parallel.dense.dp_shard=2"],
    "replicas": ["parallel.dense.dp_replicate=2", "parallel.expert.dp_replicate=2"],
    "tp": ["parallel.dense.tp=2", "parallel.expert.etp=2"],
    "ep": ["parallel.expert.ep=2"],
    "cp": ["parallel.dense.cp=2"],
    "pp": ["parallel.pp=2"],
}
NUMBERS = ("loss", "mtp_loss", "balance_loss", "total_loss", "grad_norm", "lr")
WORDS = "the a one two red blue fox dog sees runs over under tree house very slow".split()
NEAR_TIE = 1e-5
"""Scores of experts closer than this may be in another order after rounding to fp32."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two sources of documents so short that most rows have borders: MTP heads then have fewer targets than the output
    matrix."""
    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(0)
    tokenizer: list = []
    for name in ("prose", "code"):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 16))) for _ in range(400)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        out = folder / "tokens"
        steptron("data", "build", folder / f"{name}.jsonl", "--out", out, "--vocab-size", 300, *tokenizer)
        tokenizer = ["--tokenizer", out / "tokenizer.json"]
    return folder / "tokens"


def whole_recipe(corpus: Path, run_dir: Path, checkpoint: CheckpointConfig) -> Recipe:
    """Three stages with all that a step can be asked for, and no setting at its default."""
    tiny = tiny_recipe(corpus, run_dir)
    scaling = RopeScalingConfig(factor=2.0, original_max_positions=32, low_freq_factor=1.0, high_freq_factor=4.0)
    base = StageConfig(
        tokens=24 * 16,
        seq_len=16,
        batch_size=8,
        ramp=(RampStep(until=100, batch_size=4),),
        mix={"prose": 0.75, "code": 0.25},
        lr=LrConfig(kind="wsd", start=5e-4, peak=4e-3, end=1e-3, warmup=150, decay=150),
        mtp_weight=0.3,
        balance=BalanceConfig(
            bias_rate=0.02, bias_rate_end=0.005, ep_loss=0.05, num_groups=4, sequence_loss=0.03, z_loss=0.02
        ),
        limits=LimitsConfig(routed={2: 0.3}, shared={1: 0.2}),
    )
    long = StageConfig(
        tokens=8 * 32,
        seq_len=32,
        batch_size=4,
        mix={"prose": 0.2, "code": 0.8},
        lr=LrConfig(kind="cosine", peak=3e-3, end=5e-4),
        rope_theta_full=1e6,
        rope_theta_sliding=100.0,
        mtp_weight=0.1,
        balance=BalanceConfig(bias_rate=0.01, ep_loss=0.02, num_groups=2, sequence_loss=0.01, z_loss=0.03),
        limits=LimitsConfig(routed={1: 0.2}, shared={2: 0.3}),
    )
    frozen = replace(long.balance, freeze_router=True, bias_rate=0.0)
    return replace(
        tiny,
        model=replace(tiny.model, num_mtp_heads=2, max_positions=64, init_std=0.15, rope_scaling=scaling),
        stages={
            "base": base,
            "long": long,
            "end": replace(long, tokens=4 * 32, balance=frozen, lr=LrConfig(peak=2e-3)),
        },
        optim=OptimConfig(weight_decay=0.2, clip_norm=0.7, beta1=0.8, beta2=0.9, eps=1e-4, momentum=0.9),
        checkpoint=checkpoint,
    )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Networks that are built inside have parameters of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def weighted(source: str = "code") -> Iterator[None]:
    """Tokens of one source have weights as targets: none, a part, all and more."""

    def weigh(sample: Drawn) -> None:
        if sample.source == source:
            sample.weights_S[:] = np.array([0.0, 0.25, 1.0, 3.0])[sample.tokens_S % 4]

    with changed_samples(weigh):
        yield


def naive_steps(recipe: Recipe) -> list[NaiveStep]:
    """The naive run, from the initial values and the rows of the package."""
    loader, model = open_loader(recipe), Transformer(recipe.model)
    initialise(model, recipe.seed, recipe.model.init_std)

    def rows_at(stage: str, samples: range) -> Rows:
        batch = loader.batch(stage, samples).rows
        return batch.tokens_BS.tolist(), batch.documents_BS.tolist(), batch.weights_BS.tolist()

    weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    run = NaiveRun(recipe=recipe, weights={name: w.requires_grad_(name in parameters) for name, w in weights.items()})
    with default_dtype(torch.float64):
        return list(run.steps(rows_at))


def lines_beside(run_dir: Path, expected: list[NaiveStep]) -> list[tuple[dict, NaiveStep]]:
    """Each line of `metrics.jsonl` with the naive run's step."""
    lines = metrics(run_dir)
    assert [line["stage"] for line in lines] == [step.stage for step in expected]
    return list(zip(lines, expected, strict=True))


def check_numbers(line: dict, step: NaiveStep, close: float) -> None:
    """Hold a line of `metrics.jsonl` against the naive run."""
    for name in NUMBERS:
        wanted = pytest.approx(getattr(step, name), rel=close)
        assert line[name] == wanted, f"{name} of step {line['step']}: {line[name]}, not {wanted}"
    assert line["batch_tokens"] == step.rows * line["seq_len"]


def check_weights(checkpoint: Path, expected: NaiveStep, close: float) -> None:
    """Hold parameters and router biases of a checkpoint against the naive run, each by its norm."""
    found = {f"model.{name}": torch.zeros_like(weight) for name, weight in expected.weights.items()}
    load_part(checkpoint, found)
    errors = {
        name: float((found[f"model.{name}"] - weight).norm() / weight.norm())
        for name, weight in expected.weights.items()
    }
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= close}
    assert not wrong, f"weights of {checkpoint.name} are off by {wrong} of their norms"


def check_statistics(run_dir: Path, expected: list[NaiveStep]) -> None:
    """The squares of each expert's weights, which statistics have before each update, are float32 whatever the network
    is."""
    with connect(run_dir / "metrics") as tables:
        rows = tables.execute(
            "SELECT step, layer, expert, weight_square_sum FROM layer_expert WHERE step > 1"
        ).fetchall()
    assert len({step for step, *_ in rows}) == len(expected) - 1
    for step, layer, expert, found in rows:
        matrices = (expected[step - 2].weights[f"layers.{layer}.moe.experts.{name}"] for name in EXPERT_MATRICES)
        assert found == pytest.approx(sum(float(w[expert].square().sum()) for w in matrices), rel=1e-5)


def test_every_step_on_one_process_in_float64(corpus, tmp_path):
    recipe = whole_recipe(corpus, tmp_path / "run", CheckpointConfig(every=1, keep=99))
    with default_dtype(torch.float64), weighted():
        expected = naive_steps(recipe)
        assert min(step.margin for step in expected) > NEAR_TIE, (
            "a token is at a tie between experts: take another seed"
        )
        assert all(step.grad_norm > 2 * recipe.optim.clip_norm for step in expected), "the clip is to act"
        steptron("train", write_recipe(recipe, tmp_path / "whole.yaml"), check_shapes=True)
    for line, step in lines_beside(tmp_path / "run", expected):
        check_numbers(line, step, 1e-6)
        check_weights(tmp_path / "run" / "checkpoints" / f"step-{line['step']:08d}", step, 1e-6)
    check_statistics(tmp_path / "run", expected)


@pytest.fixture(scope="module")
def layouts(corpus, tmp_path_factory) -> tuple[Path, list[NaiveStep]]:
    """A folder with a run of every layout, on ranks that are started once; and the naive run.

    Micro-batches have two rows, where those of one process have one."""
    folder = tmp_path_factory.mktemp("layouts")
    recipe = whole_recipe(corpus, folder / "unused", CheckpointConfig(every=99))
    recipe = replace(recipe, stages={name: replace(s, micro_batch=2) for name, s in recipe.stages.items()})
    path = write_recipe(recipe, folder / "whole.yaml")
    commands = [["train", str(path), f"run.dir={folder / name}", *changes] for name, changes in LAYOUTS.items()]
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in commands]
    run_processes(RANKS, run_commands, commands, [store.port for store in stores])
    with weighted():
        expected = naive_steps(recipe)
    assert min(step.margin for step in expected) > NEAR_TIE, "a token is at a tie between experts: take another seed"
    return folder, expected


def run_commands(rank: int, commands: list[list[str]], ports: list[int]) -> None:
    """One rank of several runs, one after the other; `ports`: of a store for each, which the test's process has."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for command, port in zip(commands, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with weighted():
            assert main(command) == 0, " ".join(command)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_step_on_two_ranks(layouts, layout):
    folder, expected = layouts
    for line, step in lines_beside(folder / layout, expected):
        check_numbers(line, step, 1e-5)
    check_weights(folder / layout / "checkpoints" / f"step-{len(expected):08d}", expected[-1], 1e-5)
