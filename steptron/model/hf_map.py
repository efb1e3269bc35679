"""Names and shapes of the network's tensors in the released checkpoint format.

    ModelConfig ──tensor_table──▶ (our name, released key, shape, kept in fp32?) of each tensor, layer by layer

In that format, MTP head h is layer num_layers + h. `hf_config.py` converts config.json.
"""

from typing import NamedTuple

from steptron.config.schema import AttentionConfig, ModelConfig, layer_kinds


class TensorEntry(NamedTuple):
    """A tensor with its name in both formats."""

    name: str
    """Qualified name in the model's state."""
    key: str
    """Name in the released format."""
    shape: tuple[int, ...]
    fp32: bool = False
    """True if the tensor is fp32 whatever the precision of the others."""
    trained: bool = True
    """True if the tensor is a parameter that the optimizer updates. A router bias is a buffer, which the balance rule
    updates."""


def tensor_table(model: ModelConfig) -> tuple[TensorEntry, ...]:
    """Return the entries of all tensors of the network, from the embedding to the output matrix."""
    D, V = model.hidden_size, model.vocab_size
    table = [TensorEntry("embedding.weight", "model.embed_tokens.weight", (V, D))]
    for n, kind in enumerate(layer_kinds(model)):
        name, key = f"layers.{n}", f"model.layers.{n}"
        table += _attention(model, model.full if kind == "F" else model.sliding, name, key)
        table += _dense(model, name, key) if n < model.num_dense_layers else _moe(model, name, key)
    for h in range(model.num_mtp_heads):
        name, key = f"mtp.{h}", f"model.layers.{model.num_layers + h}"
        table += [
            TensorEntry(f"{name}.embedding_norm.weight", f"{key}.enorm.weight", (D,)),
            TensorEntry(f"{name}.hidden_norm.weight", f"{key}.hnorm.weight", (D,)),
            TensorEntry(f"{name}.eh_proj.weight", f"{key}.eh_proj.weight", (D, 2 * D)),
            *_attention(model, model.sliding, f"{name}.block", key),
            *_dense(model, f"{name}.block", key),
            TensorEntry(f"{name}.norm.weight", f"{key}.transformer.shared_head.norm.weight", (D,)),
            TensorEntry(f"{name}.lm_head.weight", f"{key}.transformer.shared_head.output.weight", (V, D)),
        ]
    table += [
        TensorEntry("norm.weight", "model.norm.weight", (D,)),
        TensorEntry("lm_head.weight", "lm_head.weight", (V, D)),
    ]
    return tuple(table)


def _attention(model: ModelConfig, attention: AttentionConfig, name: str, key: str) -> list[TensorEntry]:
    D, A, H, K = model.hidden_size, model.head_dim, attention.num_heads, attention.num_kv_heads
    return [
        TensorEntry(f"{name}.attention_norm.weight", f"{key}.input_layernorm.weight", (D,)),
        TensorEntry(f"{name}.attention.q_proj.weight", f"{key}.self_attn.q_proj.weight", (H * A, D)),
        TensorEntry(f"{name}.attention.k_proj.weight", f"{key}.self_attn.k_proj.weight", (K * A, D)),
        TensorEntry(f"{name}.attention.v_proj.weight", f"{key}.self_attn.v_proj.weight", (K * A, D)),
        TensorEntry(f"{name}.attention.o_proj.weight", f"{key}.self_attn.o_proj.weight", (D, H * A)),
        TensorEntry(f"{name}.attention.gate_proj.weight", f"{key}.self_attn.g_proj.weight", (H, D)),
        TensorEntry(f"{name}.attention.q_norm.weight", f"{key}.self_attn.q_norm.weight", (A,)),
        TensorEntry(f"{name}.attention.k_norm.weight", f"{key}.self_attn.k_norm.weight", (A,)),
        TensorEntry(f"{name}.ffn_norm.weight", f"{key}.post_attention_layernorm.weight", (D,)),
    ]


def _gated(name: str, key: str, hidden: int, ffn: int) -> list[TensorEntry]:
    up, down = (ffn, hidden), (hidden, ffn)
    shapes = {"gate_proj": up, "up_proj": up, "down_proj": down}
    return [TensorEntry(f"{name}.{part}.weight", f"{key}.{part}.weight", shape) for part, shape in shapes.items()]


def _dense(model: ModelConfig, name: str, key: str) -> list[TensorEntry]:
    return _gated(f"{name}.mlp", f"{key}.mlp", model.hidden_size, model.ffn_size)


def _moe(model: ModelConfig, name: str, key: str) -> list[TensorEntry]:
    D, E, I = model.hidden_size, model.moe.num_experts, model.moe.ffn_size
    return [
        TensorEntry(f"{name}.moe.router.weight", f"{key}.moe.gate.weight", (E, D)),
        TensorEntry(f"{name}.moe.router.bias", f"{key}.moe.router_bias", (E,), fp32=True, trained=False),
        TensorEntry(f"{name}.moe.experts.w_gate", f"{key}.moe.gate_proj.weight", (E, I, D)),
        TensorEntry(f"{name}.moe.experts.w_up", f"{key}.moe.up_proj.weight", (E, I, D)),
        TensorEntry(f"{name}.moe.experts.w_down", f"{key}.moe.down_proj.weight", (E, D, I)),
        *_gated(f"{name}.moe.shared", f"{key}.share_expert", D, model.moe.shared_ffn_size),
    ]
