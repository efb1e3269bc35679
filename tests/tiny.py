"""Small configurations that have everything the big one has: networks, stages and whole recipes of tests are made here.

Each function takes by name what is to be otherwise: `tiny_model(num_layers=3)`.
"""

from pathlib import Path

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
    RopeScalingConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
)

from waiting import PATIENCE_S


def tiny_model(**changes) -> ModelConfig:
    """Six layers FSSS FS, one dense, MTP-2, window shorter than the sequences, scaled RoPE with partial rotation."""
    values = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_layers": 6,
        "layer_pattern": "FSSS",
        "head_dim": 8,
        "full": AttentionConfig(num_heads=4, num_kv_heads=2, rotary_share=0.5),
        "sliding": AttentionConfig(num_heads=6, num_kv_heads=2, window=5),
        "num_dense_layers": 1,
        "ffn_size": 24,
        "moe": MoeConfig(num_experts=6, top_k=2, ffn_size=8, shared_ffn_size=12, scaling_factor=3.0),
        "num_mtp_heads": 2,
        "init_std": 0.25,
        "max_positions": 64,
        "rope_scaling": RopeScalingConfig(
            factor=2.0, original_max_positions=32, low_freq_factor=1.0, high_freq_factor=4.0
        ),
        "loss_chunk": 7,
    }
    return ModelConfig(**(values | changes))


def tiny_stage(**changes) -> StageConfig:
    """One stage with activation limits that bite and every loss on."""
    values = {
        "tokens": 1000,
        "seq_len": 20,
        "batch_size": 2,
        "mix": {"text": 1.0},
        "lr": LrConfig(peak=1e-3),
        "rope_theta_full": 500.0,
        "rope_theta_sliding": 100.0,
        "mtp_weight": 0.3,
        "balance": BalanceConfig(bias_rate=1e-3, ep_loss=0.01, num_groups=2, sequence_loss=0.01, z_loss=1e-3),
        "limits": LimitsConfig(routed={3: 0.3}, shared={3: 0.4, 4: 0.2}),
    }
    return StageConfig(**(values | changes))


def tiny_recipe(corpus: Path, run_dir: Path, data_ranks: int = 1, **changes) -> Recipe:
    """A run of two stages of ten steps, with everything switched between them.

    `corpus`: a folder as `small_runs.build_corpus` makes it. `data_ranks`: 1 or 2; each has one micro-batch a step, and
    a recipe for two accumulates two on one process."""
    base = StageConfig(
        tokens=10 * 4 * 32,
        seq_len=32,
        batch_size=4,
        micro_batch=4 // data_ranks,
        mix={"prose": 0.75, "code": 0.25},
        lr=LrConfig(kind="wsd", peak=0.01, end=0.001, warmup=256, decay=256),
        mtp_weight=0.3,
        balance=BalanceConfig(bias_rate=1e-3, ep_loss=1e-2, num_groups=4, sequence_loss=1e-3, z_loss=1e-4),
    )
    long = StageConfig(
        tokens=10 * 2 * 128,
        seq_len=128,
        batch_size=2,
        micro_batch=2 // data_ranks,
        mix={"prose": 0.2, "code": 0.8},
        lr=LrConfig(kind="cosine", peak=0.005, end=0.0005),
        mtp_weight=0.1,
        rope_theta_full=1e6,
        balance=BalanceConfig(freeze_router=True),
        limits=LimitsConfig(routed={2: 1.0}, shared={1: 2.0}),
    )
    values = {
        "run": RunConfig(name="tiny", dir=str(run_dir), device="cpu", timeout_s=PATIENCE_S),
        "seed": 1,
        "model": tiny_model(
            vocab_size=300,
            hidden_size=32,
            num_layers=3,
            layer_pattern="FS",
            sliding=AttentionConfig(num_heads=6, num_kv_heads=2, window=16),
            ffn_size=48,
            moe=MoeConfig(num_experts=8, top_k=2, ffn_size=16, shared_ffn_size=16, scaling_factor=2.0),
            num_mtp_heads=1,
            init_std=0.02,
            max_positions=128,
            rope_scaling=None,
            loss_chunk=50,
        ),
        "data": DataConfig(
            tokenizer=str(corpus / "tokenizer.json"),
            sources={name: SourceConfig(path=str(corpus / name)) for name in ("prose", "code")},
        ),
        "stages": {"base": base, "long": long},
        "monitor": MonitorConfig(level="light", flush_every=4, peak_tflops=0.1, wandb=WandbConfig(mode="disabled")),
        "checkpoint": CheckpointConfig(every=4, keep=2),
    }
    return Recipe(**(values | changes))
