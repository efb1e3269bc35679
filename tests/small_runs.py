"""Small runs through the command line: a recipe, a process, and what the run left."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from forks import run
from jaxtyping import config
from waiting import PATIENCE_S

from steptron.cli.main import main
from steptron.config.decode import encode
from steptron.config.monitoring import MonitorConfig, WandbConfig
from steptron.config.schema import (
    AttentionConfig,
    BalanceConfig,
    CheckpointConfig,
    DataConfig,
    LimitsConfig,
    LrConfig,
    ModelConfig,
    MoeConfig,
    Recipe,
    RunConfig,
    SourceConfig,
    StageConfig,
)


def command(*arguments, ranks: int = 1) -> list[str]:
    """The command line of `steptron`, under torchrun for several ranks."""
    launcher = ["-m", "steptron.cli.torchrun", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "steptron", *(str(a) for a in arguments)]


def steptron(*arguments, ranks: int = 1, code: int = 0, check_shapes: bool = False) -> subprocess.CompletedProcess:
    """Run the command line and expect an exit code: one rank in this process, several under torchrun, as forks.

    `check_shapes`: of each call of the maths, as `conftest.py` has it for all other tests. Runs make the same calls over and over."""
    words = command(*arguments, ranks=ranks)
    if ranks == 1:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), _shapes(checked=check_shapes):
            left_with = main([str(a) for a in arguments])
        done = subprocess.CompletedProcess(words, left_with, out.getvalue(), err.getvalue())
    else:
        done = run(words)
    assert done.returncode == code, f"{' '.join(words)} left with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


@contextmanager
def _shapes(checked: bool) -> Iterator[None]:
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", not checked)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)


def tiny_recipe(corpus: Path, run_dir: Path, **changes) -> Recipe:
    """Two stages of ten steps of two micro-batches on one process, everything switched between them; for one or two data ranks."""
    stage = {"seq_len": 32, "batch_size": 4, "micro_batch": 2, "mtp_weight": 0.3}
    values = {
        "run": RunConfig(name="tiny", dir=str(run_dir), device="cpu", timeout_s=PATIENCE_S),
        "seed": 1,
        "model": ModelConfig(
            vocab_size=300,
            hidden_size=32,
            num_layers=3,
            layer_pattern="FS",
            head_dim=8,
            full=AttentionConfig(num_heads=4, num_kv_heads=2, rotary_share=0.5),
            sliding=AttentionConfig(num_heads=6, num_kv_heads=2, window=8),
            num_dense_layers=1,
            ffn_size=48,
            moe=MoeConfig(num_experts=8, top_k=2, ffn_size=16, shared_ffn_size=16, scaling_factor=2.0),
            num_mtp_heads=1,
            max_positions=128,
            loss_chunk=50,
        ),
        "data": DataConfig(
            tokenizer=str(corpus / "tokenizer.json"),
            sources={name: SourceConfig(path=str(corpus / name)) for name in ("prose", "code")},
        ),
        "stages": {
            "base": StageConfig(
                tokens=10 * 4 * 32,
                mix={"prose": 0.75, "code": 0.25},
                lr=LrConfig(kind="wsd", peak=0.01, end=0.001, warmup=256, decay=256),
                balance=BalanceConfig(bias_rate=1e-3, ep_loss=1e-2, num_groups=4, sequence_loss=1e-3, z_loss=1e-4),
                **stage,
            ),
            "long": StageConfig(
                tokens=10 * 2 * 128,
                mix={"prose": 0.2, "code": 0.8},
                lr=LrConfig(kind="cosine", peak=0.005, end=0.0005),
                rope_theta_full=1e6,
                balance=BalanceConfig(freeze_router=True),
                limits=LimitsConfig(routed={2: 1.0}, shared={1: 2.0}),
                **(stage | {"seq_len": 128, "batch_size": 2, "micro_batch": 1, "mtp_weight": 0.1}),
            ),
        },
        "monitor": MonitorConfig(level="light", flush_every=4, peak_tflops=0.1, wandb=WandbConfig(mode="disabled")),
        "checkpoint": CheckpointConfig(every=4, keep=2),
    }
    return Recipe(**(values | changes))


def write_recipe(recipe: Recipe, path: Path) -> Path:
    """The recipe as a file that `steptron train` takes."""
    path.write_text(json.dumps(encode(recipe)))
    return path


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def column(run_dir: Path, name: str) -> list:
    """One column of metrics.jsonl."""
    return [line[name] for line in metrics(run_dir)]


def ledger(run_dir: Path) -> list[dict]:
    """The lines of ledger.jsonl."""
    return [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]


def build_corpus(folder: Path) -> Path:
    """Folder with tokenizer.json and the sources `prose` and `code`, the same text."""
    lines = [json.dumps({"text": f"the fox {i} sees a slow dog under the {i % 7} house. " * 9}) for i in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    out, tokenizer = folder / "tokens", []
    for name in ("prose", "code"):
        steptron("data", "build", folder / "text.jsonl", "--out", out, "--name", name, "--vocab-size", 300, *tokenizer)
        tokenizer = ["--tokenizer", out / "tokenizer.json"]
    return out
