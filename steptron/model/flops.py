"""Number of floating-point operations per token, computed from the configuration alone.

A multiply-add is two operations; a backward pass costs twice its forward. Attention counts only the keys that a query
sees.
"""

import math

from steptron.config.schema import AttentionConfig, ModelConfig, layer_kinds, moe_layers
from steptron.model.hf_map import tensor_table
from steptron.model.parts import Unit, units_of


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


def unit_costs(config: ModelConfig, seq_len: int, mtp_heads: int | None = None) -> tuple[float, ...]:
    """Return operations of forward and backward per token, for each unit of the network (`model/parts.py`).

    Sequences of `seq_len` tokens are one document each. Embedding look-ups cost nothing, and neither do MTP heads after
    the first `mtp_heads` (None: all run).
    """
    trained = config.num_mtp_heads if mtp_heads is None else mtp_heads
    kinds, dense = layer_kinds(config), config.num_dense_layers
    block = 6 * 2 * config.hidden_size**2 + _attention(config, "S", seq_len) + _ffn(config, dense=True)
    costs = {"embedding": 0.0, "block": block, "output": 6.0 * config.hidden_size * config.vocab_size}

    def cost(unit: Unit) -> float:
        if unit.kind == "attention":
            return _attention(config, kinds[unit.number], seq_len)
        if unit.kind == "ffn":
            return _ffn(config, unit.number < dense)
        return costs[unit.kind] if unit.number <= trained else 0.0

    return tuple(cost(unit) for unit in units_of(config))


def flops_per_token(config: ModelConfig, seq_len: int, mtp_heads: int | None = None) -> float:
    """Return operations of forward and backward per token; see `unit_costs`."""
    return sum(unit_costs(config, seq_len, mtp_heads))


def _attention(config: ModelConfig, kind: str, seq_len: int) -> float:
    attention = config.full if kind == "F" else config.sliding
    scores = 2 * attention.num_heads * config.head_dim * _mean_keys(attention, seq_len)
    return 6 * (_attention_weights(config, attention) + scores)


def _ffn(config: ModelConfig, dense: bool) -> float:
    D, moe = config.hidden_size, config.moe
    if dense:
        return 6.0 * 3 * D * config.ffn_size
    return 6.0 * (D * moe.num_experts + 3 * D * (moe.top_k * moe.ffn_size + moe.shared_ffn_size))


def _attention_weights(config: ModelConfig, attention: AttentionConfig) -> int:
    heads = 2 * attention.num_heads + 2 * attention.num_kv_heads
    return config.hidden_size * (heads * config.head_dim + attention.num_heads)


def _mean_keys(attention: AttentionConfig, seq_len: int) -> float:
    """Return the mean number of keys that a query of a document of `seq_len` tokens sees."""
    w = min(attention.window or seq_len, seq_len)
    return w - w * (w - 1) / (2 * seq_len)
