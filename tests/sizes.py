"""Small configurations that have everything the big one has."""

from steptron.config.schema import (
    AttentionConfig,
    BalanceConfig,
    LimitsConfig,
    LrConfig,
    ModelConfig,
    MoeConfig,
    RopeScalingConfig,
    StageConfig,
)


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
