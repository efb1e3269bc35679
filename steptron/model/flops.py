"""Number of floating-point operations per token, computed from the configuration alone.

A multiply-add is two operations; a backward pass costs twice its forward. Attention counts only the keys that a query
sees.
"""

import math
from dataclasses import dataclass

from steptron.config.schema import AttentionConfig, ModelConfig, layer_kinds, moe_layers
from steptron.model.hf_map import tensor_table


def num_parameters(config: ModelConfig) -> int:
    """Return the number of trained parameters of the whole network, MTP heads included. Router biases are buffers and
    do not count."""
    return sum(math.prod(entry.shape) for entry in tensor_table(config) if entry.trained)


def num_active_parameters(config: ModelConfig) -> int:
    """Return the number of parameters that one token uses: all but those of the routed experts that it is not sent
    to."""
    moe = config.moe
    idle = (moe.num_experts - moe.top_k) * 3 * config.hidden_size * moe.ffn_size
    return num_parameters(config) - len(moe_layers(config)) * idle


@dataclass(frozen=True)
class Costs:
    """Operations of forward and backward for one token, by part of the network."""

    layers: tuple[float, ...]
    """Operations of each backbone layer."""
    ends: float
    """Operations of the output matrix, and of the MTP heads with theirs.

    The last pipeline stage has these besides its layers. Embedding look-ups cost nothing.
    """


def costs_per_token(config: ModelConfig, seq_len: int) -> Costs:
    """Return the costs per token of sequences of `seq_len` tokens that are one document each."""
    layers = (_layer(config, kind, n < config.num_dense_layers, seq_len) for n, kind in enumerate(layer_kinds(config)))
    output = config.hidden_size * config.vocab_size
    head = _layer(config, "S", True, seq_len) + 6 * (2 * config.hidden_size**2 + output)
    return Costs(tuple(layers), 6 * output + config.num_mtp_heads * head)


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return operations of forward and backward per token, for one-document sequences of `seq_len` tokens."""
    costs = costs_per_token(config, seq_len)
    return sum(costs.layers) + costs.ends


def _layer(config: ModelConfig, kind: str, dense: bool, seq_len: int) -> float:
    D, moe = config.hidden_size, config.moe
    attention = config.full if kind == "F" else config.sliding
    weights = _attention_weights(config, attention)
    if dense:
        weights += 3 * D * config.ffn_size
    else:
        weights += D * moe.num_experts + 3 * D * (moe.top_k * moe.ffn_size + moe.shared_ffn_size)
    scores = 2 * attention.num_heads * config.head_dim * _mean_keys(attention, seq_len)
    return 6 * (weights + scores)


def _attention_weights(config: ModelConfig, attention: AttentionConfig) -> int:
    heads = 2 * attention.num_heads + 2 * attention.num_kv_heads
    return config.hidden_size * (heads * config.head_dim + attention.num_heads)


def _mean_keys(attention: AttentionConfig, seq_len: int) -> float:
    """Return the mean number of keys that a query of a document of `seq_len` tokens sees."""
    w = min(attention.window or seq_len, seq_len)
    return w - w * (w - 1) / (2 * seq_len)
