"""Arithmetic and parameter counts, from the configuration alone.

A multiply-add is two operations; a backward pass costs twice its forward. Attention counts the keys a query really sees.
"""

from steptron.config.schema import AttentionConfig, ModelConfig, layer_kinds


def _attention_weights(config: ModelConfig, attention: AttentionConfig) -> int:
    heads = 2 * attention.num_heads + 2 * attention.num_kv_heads
    return config.hidden_size * (heads * config.head_dim + attention.num_heads)


def _mean_keys(attention: AttentionConfig, seq_len: int) -> float:
    """Mean number of keys that the queries of one document of `seq_len` tokens see."""
    w = min(attention.window or seq_len, seq_len)
    return w - w * (w - 1) / (2 * seq_len)


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Operations of forward and backward for one token of one-document sequences of `seq_len` tokens."""
    D, moe = config.hidden_size, config.moe
    moe_weights = D * moe.num_experts + 3 * D * (moe.top_k * moe.ffn_size + moe.shared_ffn_size)
    dense_weights = 3 * D * config.ffn_size
    weights, scores = D * config.vocab_size * (1 + config.num_mtp_heads), 0.0
    blocks = [(kind, n < config.num_dense_layers) for n, kind in enumerate(layer_kinds(config))]
    blocks += [("S", True)] * config.num_mtp_heads
    for kind, dense in blocks:
        attention = config.full if kind == "F" else config.sliding
        weights += _attention_weights(config, attention) + (dense_weights if dense else moe_weights)
        scores += 2 * attention.num_heads * config.head_dim * _mean_keys(attention, seq_len)
    weights += config.num_mtp_heads * 2 * D * D
    return 6 * (weights + scores)
