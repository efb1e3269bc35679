"""config.json of the released format, both ways, and everything that is refused."""

import json
from dataclasses import replace

import pytest
from steptron.config.resolve import resolve
from steptron.config.schema import LimitsConfig
from steptron.errors import ExportError
from steptron.model.hf_config import ReleasedStage, config_values, read_config, released_stage

from tiny import tiny_model, tiny_stage


def released_config(**changes):
    """The config.json of the tiny model, as a reader of the file sees it."""
    values = json.loads(json.dumps(config_values(tiny_model(), released_stage(tiny_stage()), "bf16")))
    return values | changes


def without(key):
    return {k: v for k, v in released_config().items() if k != key}


def test_config_of_flash_has_the_published_values():
    recipe = resolve("step3p5_flash")
    values = config_values(recipe.model, released_stage(list(recipe.stages.values())[-1]), "bf16")
    kinds = (["full_attention"] + ["sliding_attention"] * 3) * 12
    expected = {
        "hidden_size": 4096,
        "intermediate_size": 11_264,
        "num_hidden_layers": 45,
        "num_attention_heads": 64,
        "num_attention_groups": 8,
        "vocab_size": 128_896,
        "max_position_embeddings": 262_144,
        "max_seq_len": 262_144,
        "sliding_window": 512,
        "layer_types": kinds,
        "rope_theta": [5e6 if kind == "full_attention" else 1e4 for kind in kinds],
        "partial_rotary_factors": [0.5 if kind == "full_attention" else 1.0 for kind in kinds],
        "moe_layers_enum": ",".join(str(n) for n in range(3, 45)),
        "moe_num_experts": 288,
        "moe_router_scaling_factor": 3.0,
        "swiglu_limits": [0.0] * 43 + [7.0] * 2 + [0.0] * 3,
        "swiglu_limits_shared": [0.0] * 44 + [16.0] + [0.0] * 3,
        "num_nextn_predict_layers": 3,
        "torch_dtype": "bfloat16",
    }
    assert {key: values[key] for key in expected} == expected
    assert values["attention_other_setting"]["num_attention_heads"] == 96
    assert values["rope_scaling"]["original_max_position_embeddings"] == 131_072


@pytest.mark.parametrize(
    "model",
    [
        tiny_model(),
        tiny_model(rope_scaling=None, num_mtp_heads=0, init_std=0.006),
        tiny_model(layer_pattern="S", sliding=replace(tiny_model().sliding, rotary_share=0.5)),
        tiny_model(layer_pattern="SSFFF", num_layers=5),
        tiny_model(num_dense_layers=6),
    ],
    ids=["tiny", "no scaling, no MTP", "sliding only", "pattern of the whole depth", "no MoE layer"],
)
def test_config_round_trip(model):
    limits = LimitsConfig(routed={3: 7.0}, shared={3: 7.0, 4: 16.0}) if model.num_dense_layers < 4 else LimitsConfig()
    stage = ReleasedStage(rope_theta_full=5e6, rope_theta_sliding=1e4, limits=limits)
    model = replace(model, loss_chunk="auto")
    if model.layer_pattern == "S":  # without such a layer there is nowhere to keep these
        model = replace(model, full=replace(model.full, rotary_share=1.0))
        stage = replace(stage, rope_theta_full=1e4)
    assert read_config(json.loads(json.dumps(config_values(model, stage, "fp32")))) == (model, stage)


LISTS = ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared")
SAME = {
    "lists of the backbone": {key: released_config()[key][:6] for key in LISTS},
    "lists longer than the heads": {key: [*released_config()[key], *released_config()[key][-2:]] for key in LISTS},
    "limits null in layers": {"swiglu_limits": [limit or None for limit in released_config()["swiglu_limits"]]},
    "MoE layers in a list": {"moe_layers_enum": [int(n) for n in released_config()["moe_layers_enum"].split(",")]},
    "keys that are off": {"sink": False, "use_rope_layers": [], "moe_every_n_layer": 1, "attention_bias": None},
    "keys of tools": {"auto_map": {"AutoConfig": "a.B"}, "transformers_version": "4.57.1", "use_cache": False},
    "RoPE in all layers": {"use_rope_layers": [True] * 6},
    "one share for all": {"partial_rotary_factors": released_config()["partial_rotary_factors"]},
    "both names of a key": {"num_experts_per_tok": released_config()["moe_top_k"]},
    "no true_head_dim": {
        "attention_other_setting": {
            k: v for k, v in released_config()["attention_other_setting"].items() if k != "true_head_dim"
        }
    },
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME.keys())
def test_variants_of_the_same_network_are_read_as_it(change):
    assert read_config(released_config(**change)) == read_config(released_config())


@pytest.mark.parametrize("absent", [True, False], ids=["absent", "null"])
def test_no_limits_are_zero_limits(absent):
    keys = ("swiglu_limits", "swiglu_limits_shared")
    other = (
        {k: v for k, v in released_config().items() if k not in keys} if absent else released_config(swiglu_limits=None)
    )
    if not absent:
        other["swiglu_limits_shared"] = None
    assert read_config(other) == read_config(released_config(**dict.fromkeys(keys, [0.0] * 8)))
    assert read_config(other)[1].limits == LimitsConfig()


def test_one_theta_for_all_layers():
    _, stage = read_config(released_config(rope_theta=12345.0))
    assert (stage.rope_theta_full, stage.rope_theta_sliding) == (12345.0, 12345.0)


@pytest.mark.parametrize("heads", [0, 1, 2])
def test_fewer_heads_are_taken(heads):
    model, stage = read_config(released_config(), heads)
    assert (replace(model, num_mtp_heads=2), stage) == read_config(released_config())
    assert model.num_mtp_heads == heads


def test_more_heads_than_there_are_cannot_be_taken():
    with pytest.raises(ExportError, match=r"--mtp-heads=3 must be from 0 to config.json's num_nextn_predict_layers=2"):
        read_config(released_config(), 3)
    with pytest.raises(ExportError, match="--mtp-heads=-1"):
        read_config(released_config(), -1)


def test_heads_that_no_list_tells_of_are_refused():
    full = tiny_model(layer_pattern="F")
    values = json.loads(json.dumps(config_values(full, released_stage(tiny_stage()), "bf16")))
    values["rope_theta"] = values["rope_theta"][:6]
    with pytest.raises(ExportError, match=r"rope_theta has no entry for a sliding_attention layer.*--mtp-heads 0"):
        read_config(values)
    assert read_config(values, 0)[0].num_mtp_heads == 0


OPTIONAL = {
    *("architectures", "att_impl_type", "initializer_range", "max_seq_len", "need_fp32_gate", "norm_expert_weight"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype", "use_head_wise_attn_gate"),
    *("use_moe", "use_moe_router_bias", "use_qk_norm", "zero_centered"),
}


@pytest.mark.parametrize("key", sorted(set(released_config()) - OPTIONAL - {"swiglu_limits", "swiglu_limits_shared"}))
def test_a_missing_key_is_named(key):
    with pytest.raises(ExportError, match=rf"config.json: the key {key} is missing"):
        read_config(without(key))


@pytest.mark.parametrize("key", sorted(OPTIONAL))
def test_a_key_that_may_be_missing_changes_nothing(key):
    default = {"initializer_range": 0.02} if key == "initializer_range" else {}
    assert read_config(without(key)) == read_config(released_config(**default))
    if key != "initializer_range":
        assert read_config(released_config(**{key: None})) == read_config(released_config())


WRONG = {
    "another model": (
        {"model_type": "llama"},
        "model_type='llama' is not supported, because this network has 'step3p5'",
    ),
    "another router": ({"moe_router_activation": "softmax"}, "moe_router_activation='softmax'"),
    "no gate": ({"use_head_wise_attn_gate": False}, "use_head_wise_attn_gate=False"),
    "text for a number": ({"hidden_size": "16"}, "model.hidden_size=16 must be an integer"),
    "text for a count": ({"num_hidden_layers": "6"}, "num_hidden_layers='6' must be a whole number"),
    "no layers": ({"num_hidden_layers": 0}, "at least 1"),
    "short list of types": (
        {"layer_types": ["full_attention"]},
        "layer_types must be a list of 6 or 8 entries, one per layer; found 1",
    ),
    "unknown type": ({"layer_types": ["linear"] * 8}, r"layer_types\[0\]='linear' must be one of full_attention"),
    "MTP with full attention": ({"layer_types": ["full_attention"] * 8}, r"layer_types\[6\].*MTP head"),
    "MoE layers with a hole": ({"moe_layers_enum": "1,2,4,5"}, "moe_layers_enum='1,2,4,5'"),
    "MoE layers in words": ({"moe_layers_enum": "all"}, "moe_layers_enum='all'"),
    "MoE off": ({"use_moe": False}, "use_moe=False contradicts"),
    "thetas that differ": (
        {"rope_theta": [1e4, 1e4, 1e4, 2e4] * 2},
        "rope_theta has both 10000.0 and 20000.0 among the sliding",
    ),
    "theta no list": ({"rope_theta": "1e4"}, "rope_theta must be a list of 6 or 8 entries"),
    "limit of a dense layer": ({"swiglu_limits": [7.0] + [0.0] * 7}, r"swiglu_limits\[0\]=7.0, but layer 0"),
    "limit of an MTP head": ({"swiglu_limits_shared": [0.0] * 7 + [7.0]}, r"swiglu_limits_shared\[7\]=7.0"),
    "another scaling": (
        {"rope_scaling": released_config()["rope_scaling"] | {"rope_type": "yarn"}},
        "rope_type='yarn' is not supported",
    ),
    "sink": ({"sink": True}, "sink=True is not supported, because this network has False"),
    "layers without RoPE": ({"use_rope_layers": [True, False] * 3}, "use_rope_layers=.*is not supported"),
    "another head size": ({"true_head_dim": 4}, "true_head_dim=4 is not supported, because this network has 8"),
    "another head size of sliding layers": (
        {"attention_other_setting": released_config()["attention_other_setting"] | {"true_head_dim": 4}},
        "attention_other_setting.true_head_dim=4 differs from head_dim=8",
    ),
    "another activation": (
        {"hidden_act": "gelu"},
        "hidden_act='gelu' is not supported, because this network has 'silu'",
    ),
    "attention bias": ({"attention_bias": True}, "attention_bias=True is not supported"),
    "tied embeddings": ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported"),
    "MoE in every second layer": ({"moe_every_n_layer": 2}, "moe_every_n_layer=2 is not supported"),
    "another scale": ({"query_pre_attn_scalar": 16}, "query_pre_attn_scalar=16 is not supported"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
    "other architecture": ({"architectures": ["Step4ForCausalLM"]}, "architectures=.*Step4ForCausalLM"),
    "scaling of all layers": ({"yarn_only_types": []}, r"yarn_only_types=\[\] is not supported"),
    "unknown key": ({"logit_softcap": 30.0}, "logit_softcap=30.0 is not known here .* remove logit_softcap"),
    "unknown key that is off": ({"norm_topk_prob": False}, "norm_topk_prob=False is not known here"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config=.*is not known here"),
    "unknown key of a section": (
        {"rope_scaling": released_config()["rope_scaling"] | {"attention_factor": 2.0}},
        "rope_scaling.attention_factor=2.0 is not known here",
    ),
    "other attention kind": (
        {"attention_other_setting": released_config()["attention_other_setting"] | {"attention_type": "linear"}},
        "attention_other_setting.attention_type='linear' is not supported",
    ),
    "two names that disagree": ({"num_experts_per_tok": 1}, "num_experts_per_tok says moe_top_k=1, but moe_top_k=2"),
    "half a scaling": ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling must be a section .* missing: factor"),
    "two head sizes": (
        {"attention_other_setting": released_config()["attention_other_setting"] | {"head_dim": 4}},
        "attention_other_setting.head_dim=4 differs from head_dim=8",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_config_of_another_network_is_refused(change, message):
    with pytest.raises(ExportError, match=message):
        read_config(released_config(**change))


ODD = [None, True, -1, 7, 0.5, "x", [], [1], {}, {"a": 1}]


@pytest.mark.parametrize("key", sorted(released_config()))
def test_odd_values_are_refused_in_one_line(key):
    """Whatever stands there, the answer is a network or an `ExportError`, never another exception."""
    for value in ODD:
        try:
            read_config(released_config(**{key: value}))
        except ExportError as error:
            assert "\n" not in str(error)  # noqa: PT017
