"""A made-up run that looks like a real one: losses that fall by stage, spikes, experts that starve, two sources."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from steptron.config.monitoring import MonitorConfig, WandbConfig
from steptron.config.schema import (
    AttentionConfig,
    DataConfig,
    LrConfig,
    ModelConfig,
    MoeConfig,
    Recipe,
    RunConfig,
    SourceConfig,
    StageConfig,
)

SHARES = {"base": (0.7, 0.3), "long": (0.6, 0.4), "anneal": (0.45, 0.55)}
SPEEDS = {"base": 31_000.0, "long": 24_500.0, "anneal": 17_800.0}


def make_recipe(run_dir: Path, steps: int = 60, **monitor: Any) -> Recipe:
    """Three stages that share `steps` as 5 : 3 : 2; W&B is off unless `monitor` says otherwise."""
    lengths, batches = (512, 4096, 16384), (16, 4, 1)
    counts = (math.ceil(steps * 0.5), math.ceil(steps * 0.3), math.ceil(steps * 0.2))
    stages = {}
    for name, length, batch, count in zip(SHARES, lengths, batches, counts, strict=True):
        prose, code = SHARES[name]
        stages[name] = StageConfig(
            tokens=length * batch * count,
            seq_len=length,
            batch_size=batch,
            mix={"prose": prose, "code": code},
            lr=LrConfig(kind="cosine", peak=3e-3 if name == "base" else 8e-4, end=3e-4),
            mtp_weight=0.3 if name == "base" else 0.1,
        )
    attention = AttentionConfig(num_heads=4, num_kv_heads=2)
    model = ModelConfig(
        vocab_size=4096,
        hidden_size=128,
        num_layers=9,
        layer_pattern="FSSS",
        head_dim=32,
        full=attention,
        sliding=AttentionConfig(num_heads=4, num_kv_heads=2, window=128),
        num_dense_layers=1,
        ffn_size=256,
        moe=MoeConfig(num_experts=16, top_k=2, ffn_size=64, shared_ffn_size=64),
    )
    sources = {name: SourceConfig(path=f"data/demo/{name}") for name in ("prose", "code")}
    return Recipe(
        run=RunConfig(name=run_dir.name, dir=str(run_dir)),
        model=model,
        data=DataConfig(sources=sources, tokenizer="data/demo/tokenizer.json"),
        stages=stages,
        monitor=MonitorConfig(**({"wandb": WandbConfig(mode="disabled")} | monitor)),
    )


def make_steps(
    recipe: Recipe, num_layers: int = 8, num_experts: int = 16, seed: int = 0
) -> Iterator[tuple[dict[str, Any], np.ndarray, dict[str, int]]]:
    """What the loop would hand to `Collector.step`, step by step, until the budgets are spent."""
    random = np.random.default_rng(seed)
    skew_LE = random.normal(0, 1.1, (num_layers, num_experts))
    step = tokens = 0
    total_steps = sum(stage.tokens // (stage.seq_len * stage.batch_size) for stage in recipe.stages.values())
    for name, stage in recipe.stages.items():
        batch, done = stage.seq_len * stage.batch_size, 0
        while done < stage.tokens:
            progress = step / max(1, total_steps)
            done += batch
            tokens += batch
            step += 1
            settle = 0.25 * math.exp(-done / batch / (0.06 * total_steps)) if name != "base" else 0.0
            lm = 2.1 + 6.2 * math.exp(-9 * progress) - 0.5 * progress + settle + float(random.normal(0, 0.035))
            norm = 0.35 + 3.0 * math.exp(-14 * progress) + float(random.gamma(2.0, 0.04))
            if random.random() < 0.004:
                lm, norm = lm + float(random.uniform(0.3, 0.9)), norm * float(random.uniform(3, 9))
            mtp = lm * 1.12 + 0.2
            balance = 1.0 + 0.4 * math.exp(-12 * progress) + abs(float(random.normal(0, 0.01)))
            speed = SPEEDS[name] * float(random.normal(1, 0.03)) * (0.55 if step % 97 == 0 else 1.0)
            rate = stage.lr.end or 0.0
            rate += (stage.lr.peak - rate) * 0.5 * (1 + math.cos(math.pi * done / stage.tokens))
            if name == "base":
                rate *= min(1.0, step / max(1, 0.03 * total_steps))
            metrics = {
                "step": step,
                "stage": name,
                "tokens": tokens,
                "loss": lm + stage.mtp_weight * mtp,
                "lm_loss": lm,
                "mtp_loss": mtp,
                "balance_loss": balance,
                "grad_norm": norm,
                "lr": rate,
                "seq_len": stage.seq_len,
                "batch_tokens": batch,
                "step_time": batch / speed,
                "tokens_per_second": speed,
                "mfu": speed / 62_000,
            }
            yield metrics, _loads(random, skew_LE, progress, batch * 2), _sources(random, stage, batch)


def _loads(random: np.random.Generator, skew_LE: np.ndarray, progress: float, total: int) -> np.ndarray:
    """Tokens by layer and expert: skewed at first, even later; one expert of layer 2 starves from half way."""
    logits_LE = skew_LE * math.exp(-7 * progress) + random.normal(0, 0.06, skew_LE.shape)
    if progress > 0.5:
        logits_LE[2 % len(skew_LE), 5 % skew_LE.shape[1]] -= 18 * (progress - 0.5)
    shares_LE = np.exp(logits_LE)
    shares_LE /= shares_LE.sum(axis=1, keepdims=True)
    return np.stack([random.multinomial(total, shares_E) for shares_E in shares_LE])


def _sources(random: np.random.Generator, stage: StageConfig, batch: int) -> dict[str, int]:
    rows = random.multinomial(stage.batch_size, list(stage.mix.values()))
    return {name: int(count) * (batch // stage.batch_size) for name, count in zip(stage.mix, rows, strict=True)}
