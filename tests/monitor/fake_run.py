"""A made-up run that looks like a real one: losses that fall by stage, spikes, two sources; one expert that starves,
one that blows up, one that dies while tokens still come to it, and a slow rank."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from steptron.config.monitoring import MonitorConfig, WandbConfig
from steptron.config.schema import (
    AttentionConfig,
    DataConfig,
    LrConfig,
    MoeConfig,
    Recipe,
    RunConfig,
    SourceConfig,
    StageConfig,
)
from steptron.monitor.sinks.metrics_jsonl import JsonlSink
from steptron.monitor.statistics.frame import Frame
from steptron.monitor.statistics.plane import Surface, full_registry
from steptron.monitor.statistics.registry import Registry
from steptron.monitor.storage.ledger import Ledger
from steptron.monitor.storage.store import Store

from tiny import tiny_model

SHARES = {"base": (0.7, 0.3), "long": (0.6, 0.4), "anneal": (0.45, 0.55)}
EVALUATED_EVERY = 10
"""The steps from one evaluation to the next; the first step has one."""
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
    model = tiny_model(
        vocab_size=4096,
        hidden_size=128,
        num_layers=9,
        head_dim=32,
        full=attention,
        sliding=AttentionConfig(num_heads=4, num_kv_heads=2, window=128),
        ffn_size=256,
        moe=MoeConfig(num_experts=16, top_k=2, ffn_size=64, shared_ffn_size=64),
        num_mtp_heads=0,
        init_std=0.02,
        max_positions=4096,
        rope_scaling=None,
        loss_chunk=256,
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
                "loss": lm,
                "mtp_loss": mtp,
                "balance_loss": balance,
                "total_loss": lm + stage.mtp_weight * mtp,
                "grad_norm": norm,
                "lr": rate,
                "seq_len": stage.seq_len,
                "batch_tokens": batch,
                "step_time": batch / speed,
                "tokens_per_second": speed,
                "mfu": speed / 62_000,
            }
            if step % EVALUATED_EVERY == 1:
                metrics |= {f"eval/{name}": lm + 0.1 for name in ("loss", "loss/held", "position/0", "mtp/1")}
                metrics |= {"eval/perplexity": math.exp(lm + 0.1), "eval/bits_per_byte": (lm + 0.1) / 3}
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
    drawn = {name: int(count) * (batch // stage.batch_size) for name, count in zip(stage.mix, rows, strict=True)}
    return dict(sorted(drawn.items()))  # in another order than the recipe's, as the loader may


LAYERS = tuple(range(1, 9))
"""MoE layers of the made-up model; layer 0 is dense."""
EXPERTS = 16
BLOW_UP, DEATH, SLOW = (7, 11), (4, 3), 2
"""Layer and expert of what goes wrong, and the slow rank."""
_PARTS = (
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.o_proj",
    "moe.router",
    "moe.experts.gate",
    "moe.experts.up",
    "moe.experts.down",
)


def make_registry(world_size: int = 4) -> Registry:
    """Every statistic, as rank 0 of a run without pipeline or expert parallelism has them."""
    names = [f"layers.{layer}.{part}.weight" for layer in range(9) for part in _PARTS if layer or "moe" not in part]
    surface = Surface(
        moe_layers=LAYERS,
        num_experts=EXPERTS,
        world_size=world_size,
        layers_here=range(9),
        moe_layers_here=LAYERS,
        experts_here=range(EXPERTS),
        num_heads=4,
        parameters=["embedding.weight", *names, "head.weight"],
        sources=("prose", "code"),
        positions=(0, 128, 512, 2048, 8192),
        num_mtp_heads=3,
        modules=(),
    )
    return full_registry(surface)


def make_plane(
    registry: Registry, metrics: dict[str, Any], tokens_LE: np.ndarray, progress: float, seed: int = 0
) -> np.ndarray:
    """The values of one step, from its scalars, its expert loads and how far the run is."""
    random = np.random.default_rng((seed, metrics["step"]))
    plane = np.zeros(registry.slots, dtype=np.float32)

    def put(name: str, values: Any) -> None:
        registry.view(plane, name)[...] = values

    def noise(name: str, spread: float) -> np.ndarray:
        return np.exp(random.normal(0, spread, registry.statistics[name].shape))

    late = max(0.0, progress - 0.6)
    blow, death = np.ones(tokens_LE.shape), np.ones(tokens_LE.shape)
    blow[LAYERS.index(BLOW_UP[0]), BLOW_UP[1]] = math.exp(9 * late)
    death[LAYERS.index(DEATH[0]), DEATH[1]] = math.exp(-8 * late)
    depth_L1 = np.linspace(1, 2.2, len(LAYERS))[:, None]
    tokens = np.maximum(tokens_LE, 0)
    for name in ("tokens", "rows"):
        put(name, tokens)
    put("elements", tokens * 64)
    put("h_square_sum", tokens * 64 * (0.8 * depth_L1 * death * noise("rows", 0.05)) ** 2)
    put("out_norm_sum", tokens * 3.0 * depth_L1 * blow * death * noise("rows", 0.06))
    put("weight_square_sum", (12 * death**0.5 * blow**0.3 * noise("rows", 0.01)) ** 2)
    total_L = tokens.sum(axis=1)
    put("router_tokens", total_L / 2)
    put("confidence_sum", total_L / 2 * (0.3 + 0.3 * progress + 0.01 * random.normal(size=len(LAYERS))))
    put("entropy_sum", total_L / 2 * (2.6 - 0.5 * progress + 0.02 * random.normal(size=len(LAYERS))))
    put("margin_sum", total_L / 2 * 0.05 * noise("router_tokens", 0.1))
    put("mass_sum", tokens / 2)
    for name in ("peak_gate", "peak_up"):
        put(name, 4 * depth_L1 * blow * noise("rows", 0.1))
    for name in ("gate_square_sum", "up_square_sum"):
        put(name, tokens)
    put("gate_up_sum", tokens * np.clip(0.1 + 0.03 * random.normal(size=tokens.shape), -1, 1))
    put("routed_norm_sum", 0.8 * total_L * noise("router_tokens", 0.05))
    put("shared_norm_sum", total_L)
    put("logit_max", 9 * noise("router_tokens", 0.08))
    heads = registry.statistics["gate_sum"].shape
    put("gate_tokens", 1000)
    put("gate_sum", 1000 * (0.3 + 0.4 * np.linspace(0, 1, heads[1]) + 0.02 * random.normal(size=heads)))
    put("attention_samples", 64)
    put("attention_entropy_sum", 64 * (3.2 - progress + 0.1 * random.normal(size=heads)))
    rms = np.linspace(1, 5, heads[0]) * (1 + 0.5 * progress) * noise("residual_max", 0.02)
    put("residual_elements", 1)
    put("residual_square_sum", rms**2)
    put("residual_max", rms * 18 * noise("residual_max", 0.1))
    put("gain_elements", 1)
    for which in "qk":
        put(f"{which}_gain_square_sum", (1 + 0.2 * progress) ** 2 * noise("residual_max", 0.01))
    put("loss", metrics["loss"])
    put("grad_norm", metrics["grad_norm"])
    slow = np.ones(registry.statistics["step_time"].shape)
    slow[SLOW % len(slow)] = 1.6 if progress > 0.75 else 1.0
    put("step_time", metrics["step_time"] * slow * noise("step_time", 0.02))
    put("data_wait", 0.01 * metrics["step_time"] * noise("step_time", 0.4))
    put("communication_time", 0.12 * metrics["step_time"] * noise("step_time", 0.1))
    norms = 0.05 * metrics["grad_norm"] * noise("gradient_square_sum", 0.15)
    norms[_parameter(registry, f"layers.{BLOW_UP[0]}.moe.experts.down.weight")] *= math.exp(5 * late)
    put("gradient_square_sum", norms**2)
    put("parameter_square_sum", (20 * noise("gradient_square_sum", 0.01)) ** 2)
    put("update_square_sum", (0.02 * metrics["lr"] * 1e3 * noise("gradient_square_sum", 0.1)) ** 2)
    put("matrices", 1)
    put("orthogonality_square_sum", (0.02 * noise("gradient_square_sum", 0.2)) ** 2)
    for prefix, offsets in (
        ("source", (0.15, -0.25)),
        ("position", (0.5, 0.2, 0.0, -0.1, -0.15)),
        ("mtp", (0.1, 0.4, 0.7)),
    ):
        put(f"{prefix}_targets", 100)
        put(f"{prefix}_loss_sum", 100 * (metrics["loss"] + np.array(offsets)))
    return plane


def _parameter(registry: Registry, name: str) -> int:
    return registry.statistics["gradient_square_sum"].grid[0].values.index(name)


class FakeRun:
    """A run folder that grows step by step as training's would, alarms among it."""

    def __init__(self, run_dir: Path, steps: int = 60, flush_every: int = 5, level: str = "full", **evil: str):
        run_dir.mkdir(parents=True, exist_ok=True)
        recipe = make_recipe(run_dir, steps, flush_every=flush_every, level=level)
        plain = json.loads(json.dumps(dataclasses.asdict(recipe)))
        (run_dir / "recipe.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
        self.run_dir, self.steps, self.rows = run_dir, steps, make_steps(recipe)
        self.ledger, self.scalars, self.registry = Ledger(run_dir), JsonlSink(run_dir), make_registry()
        self.store = Store(run_dir / "metrics", "rank-00000", self.registry, flush_every) if level != "off" else None
        self.ledger.write("run_start", 0, world_size=4, device="cpu", **evil)
        self._stage = ""

    def advance(self, count: int | None = None) -> None:
        """Write so many steps; all that are left for None."""
        for _ in range(count if count is not None else self.steps + 3):
            row = next(self.rows, None)
            if row is None:
                break
            metrics, tokens_LE, sources = row
            step, progress = metrics["step"], metrics["step"] / self.steps
            if metrics["stage"] != self._stage:
                self._stage = metrics["stage"]
                self.ledger.write("stage_start", step - 1, stage=self._stage, seq_len=metrics["seq_len"])
            self.scalars.write(Frame(step=step, metrics=metrics, tokens_by_source=sources, plane=None))
            if self.store is not None:
                self.store.add(step, make_plane(self.registry, metrics, tokens_LE, progress))
            self._alarms(step)
        if self.store is not None:
            self.store.flush()

    def finish(self, **end: object) -> None:
        """Write all that is left, and the end: `reason` and `exit_code`, where it is an early one."""
        self.advance()
        self.ledger.write("run_end", self.steps, **end)

    def _alarms(self, step: int) -> None:
        """As the detectors write them."""
        share = step / self.steps
        before = (step - 1) / self.steps
        for when, event in _ALARMS:
            if before < when <= share:
                kind, evidence = event
                self.ledger.write(kind, step, **evidence)


def _alarm(
    detector: str, where: dict[str, Any], value: float, threshold: float, unit: str, text: str, kind: str = "alarm"
) -> tuple[str, dict[str, Any]]:
    return kind, {
        "detector": detector,
        "since": 1,
        "count": 1,
        "where": where,
        "value": value,
        "threshold": threshold,
        "unit": unit,
        "text": text,
    }


_ALARMS = (
    (
        0.35,
        _alarm(
            "loss_spike",
            {"side": "up"},
            7.4,
            6.0,
            "spreads",
            "loss 4.013 is 7.4 spreads above the window's median of 2.871",
        ),
    ),
    (
        0.36,
        (
            "decision",
            {
                "act": "skip",
                "since": 1,
                "clip_layers": [],
                "detectors": ["loss_spike"],
                "reason": "loss_spike: the update of this step is left out",
            },
        ),
    ),
    (
        0.39,
        _alarm(
            "loss_spike", {"side": "up"}, 0.3, 6.0, "spreads", "loss is back within the window", kind="alarm_cleared"
        ),
    ),
    (0.55, ("checkpoint", {"path": "checkpoints/step-00000300", "seconds": 1.9})),
    (
        0.72,
        _alarm(
            "blow_up",
            {"layer": 7, "expert": 11},
            3.1,
            3.0,
            "× median",
            "layer 7: the output of expert 11 is 3.1 × the median expert's, and rising",
        ),
    ),
    (
        0.73,
        (
            "decision",
            {
                "act": "clip",
                "since": 1,
                "clip_layers": [7],
                "detectors": ["blow_up"],
                "reason": "blow_up: activation limit 7 is switched on for layer 7",
            },
        ),
    ),
    (
        0.80,
        _alarm(
            "expert_death",
            {"layer": 4, "expert": 3},
            0.21,
            0.25,
            "× median",
            "layer 4: expert 3 has activation RMS 0.21 × and weight norm 0.45 × the median expert's",
        ),
    ),
    (
        0.84,
        _alarm(
            "straggler",
            {"rank": 2},
            1.6,
            1.5,
            "× median",
            "rank 2 takes 1.6 × the median rank's time, 0.31 s more a step",
        ),
    ),
)
