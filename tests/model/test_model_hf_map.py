"""Names and shapes of the released format, against the model itself and the published figures."""

import pytest
import torch
from steptron.config.resolve import resolve
from steptron.model.hf_map import tensor_table
from steptron.model.transformer import Transformer

from tiny import tiny_model


@pytest.mark.parametrize(
    "model",
    [
        tiny_model(),
        tiny_model(num_mtp_heads=0, num_dense_layers=0),
        tiny_model(num_dense_layers=6),
        tiny_model(num_layers=1),
    ],
    ids=["all kinds of tensors", "no MTP, no dense layer", "dense layers only", "one layer"],
)
def test_the_table_is_the_state_of_the_model(model):
    with torch.device("meta"):
        state = Transformer(model).state_dict()
    table = tensor_table(model)
    assert {entry.name: entry.shape for entry in table} == {name: tuple(t.shape) for name, t in state.items()}
    assert [entry.name for entry in table if entry.fp32] == [n for n in state if n.endswith("router.bias")]
    assert len({entry.key for entry in table}) == len(table) == len({entry.name for entry in table})


def test_an_mtp_head_has_the_names_of_what_it_does():
    """The released code calls the norm of the embedding `enorm`, that of the hidden state `hnorm`; what is the head's
    alone lies below `transformer.shared_head`. Shapes do not tell them apart."""
    keys = {entry.name: entry.key for entry in tensor_table(tiny_model())}
    for head in (0, 1):
        there = f"model.layers.{6 + head}"
        assert keys[f"mtp.{head}.embedding_norm.weight"] == f"{there}.enorm.weight"
        assert keys[f"mtp.{head}.hidden_norm.weight"] == f"{there}.hnorm.weight"
        assert keys[f"mtp.{head}.eh_proj.weight"] == f"{there}.eh_proj.weight"
        assert keys[f"mtp.{head}.norm.weight"] == f"{there}.transformer.shared_head.norm.weight"
        assert keys[f"mtp.{head}.lm_head.weight"] == f"{there}.transformer.shared_head.output.weight"
        assert keys[f"mtp.{head}.block.attention_norm.weight"] == f"{there}.input_layernorm.weight"
        assert keys[f"mtp.{head}.block.ffn_norm.weight"] == f"{there}.post_attention_layernorm.weight"
        assert keys[f"mtp.{head}.block.attention.q_norm.weight"] == f"{there}.self_attn.q_norm.weight"
        assert keys[f"mtp.{head}.block.mlp.up_proj.weight"] == f"{there}.mlp.up_proj.weight"


def test_flash_has_the_published_names_shapes_and_bytes():
    recipe = resolve("step3p5_flash")
    table = {entry.key: entry for entry in tensor_table(recipe.model)}
    assert len(table) == 804
    elements = {key: torch.Size(entry.shape).numel() for key, entry in table.items()}
    biases = {key: count for key, count in elements.items() if table[key].fp32}
    assert sum(biases.values()) == 12_096
    assert sum(elements.values()) - 12_096 == 199_384_289_280
    assert 2 * (sum(elements.values()) - 12_096) + 4 * 12_096 == 398_768_626_944
    expected = {
        "model.embed_tokens.weight": (128_896, 4096),
        "model.layers.0.self_attn.q_proj.weight": (8192, 4096),
        "model.layers.1.self_attn.q_proj.weight": (12_288, 4096),
        "model.layers.1.self_attn.g_proj.weight": (96, 4096),
        "model.layers.2.mlp.down_proj.weight": (4096, 11_264),
        "model.layers.3.moe.gate.weight": (288, 4096),
        "model.layers.44.moe.router_bias": (288,),
        "model.layers.44.moe.up_proj.weight": (288, 1280, 4096),
        "model.layers.44.moe.down_proj.weight": (288, 4096, 1280),
        "model.layers.44.share_expert.gate_proj.weight": (1280, 4096),
        "model.layers.45.enorm.weight": (4096,),
        "model.layers.45.eh_proj.weight": (4096, 8192),
        "model.layers.46.self_attn.o_proj.weight": (4096, 12_288),
        "model.layers.47.mlp.up_proj.weight": (11_264, 4096),
        "model.layers.47.transformer.shared_head.norm.weight": (4096,),
        "model.layers.47.transformer.shared_head.output.weight": (128_896, 4096),
        "lm_head.weight": (128_896, 4096),
    }
    assert {key: table[key].shape for key in expected} == expected
