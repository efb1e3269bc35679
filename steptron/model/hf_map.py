"""The network in the released checkpoint format: names and shapes of its tensors, and config.json, both ways. Pure.

    ModelConfig ──tensor_table──▶ (our name, released key, shape, kept in fp32?) a tensor, in the order of the layers
    ModelConfig, ReleasedStage ──config_values──▶ config.json ──read_config──▶ ModelConfig, ReleasedStage

MTP head h is layer num_layers + h there; lists by layer have its entries too. A layer without a limit has the limit 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from steptron.config.decode import decode
from steptron.config.schema import AttentionConfig, LimitsConfig, ModelConfig, Precision, StageConfig, layer_kinds
from steptron.errors import ExportError, RecipeError

LAYER_TYPES = {"F": "full_attention", "S": "sliding_attention"}
DTYPES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16"}

FIXED = {
    "model_type": "step3p5",
    "architectures": ["Step3p5ForCausalLM"],
    "att_impl_type": "GQA",
    "use_qk_norm": True,
    "use_head_wise_attn_gate": True,
    "yarn_only_types": [LAYER_TYPES["F"]],
    "moe_router_activation": "sigmoid",
    "norm_expert_weight": True,
    "use_moe_router_bias": True,
    "need_fp32_gate": True,
    "zero_centered": True,
}
"""What every model of this kind has in config.json; another value is another network."""


class TensorEntry(NamedTuple):
    """One tensor under both of its names."""

    name: str
    """Qualified name in the model's state."""
    key: str
    """Name in the released format."""
    shape: tuple[int, ...]
    fp32: bool = False
    """Kept in fp32 whatever the precision of the others."""


@dataclass(frozen=True, kw_only=True)
class ReleasedStage:
    """The part of a stage that changes what the network computes, and that config.json therefore holds."""

    rope_theta_full: float
    """RoPE base of the full layers."""
    rope_theta_sliding: float
    """RoPE base of the sliding layers."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Activation limits."""


def released_stage(stage: StageConfig) -> ReleasedStage:
    """What an exported model keeps of the stage it was trained in last."""
    return ReleasedStage(
        rope_theta_full=stage.rope_theta_full, rope_theta_sliding=stage.rope_theta_sliding, limits=stage.limits
    )


def tensor_table(model: ModelConfig) -> tuple[TensorEntry, ...]:
    """Every tensor of the network, embedding first, output matrix last."""
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
        TensorEntry(f"{name}.moe.router.bias", f"{key}.moe.router_bias", (E,), fp32=True),
        TensorEntry(f"{name}.moe.experts.w_gate", f"{key}.moe.gate_proj.weight", (E, I, D)),
        TensorEntry(f"{name}.moe.experts.w_up", f"{key}.moe.up_proj.weight", (E, I, D)),
        TensorEntry(f"{name}.moe.experts.w_down", f"{key}.moe.down_proj.weight", (E, D, I)),
        *_gated(f"{name}.moe.shared", f"{key}.share_expert", D, model.moe.shared_ffn_size),
    ]


def config_values(model: ModelConfig, stage: ReleasedStage, precision: Precision) -> dict[str, Any]:
    """The values of config.json, all keys that readers of the released model ask for.

    Raises `ExportError` where the network does what the released one has no key for."""
    if model.moe.route_groups > 1:
        raise ExportError(
            f"model.moe.route_groups={model.moe.route_groups} cannot be exported: the released format has no route groups; "
            "only networks with 1 have a form in it"
        )
    kinds = layer_kinds(model) + "S" * model.num_mtp_heads
    moe_layers = range(model.num_dense_layers, model.num_layers)
    full, sliding, scaling = model.full, model.sliding, model.rope_scaling
    return FIXED | {
        "torch_dtype": DTYPES[precision],
        "tie_word_embeddings": False,
        "initializer_range": model.init_std,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_nextn_predict_layers": model.num_mtp_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_positions,
        "max_seq_len": model.max_positions,
        "rms_norm_eps": model.norm_eps,
        "layer_types": [LAYER_TYPES[kind] for kind in kinds],
        "num_attention_heads": full.num_heads,
        "num_attention_groups": full.num_kv_heads,
        "head_dim": model.head_dim,
        "sliding_window": sliding.window,
        "attention_other_setting": {
            "attention_type": LAYER_TYPES["S"],
            "num_attention_heads": sliding.num_heads,
            "num_attention_groups": sliding.num_kv_heads,
            "head_dim": model.head_dim,
            "true_head_dim": model.head_dim,
        },
        "rope_theta": [stage.rope_theta_full if kind == "F" else stage.rope_theta_sliding for kind in kinds],
        "partial_rotary_factors": [full.rotary_share if kind == "F" else sliding.rotary_share for kind in kinds],
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_positions,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        },
        "use_moe": len(moe_layers) > 0,
        "moe_layers_enum": ",".join(map(str, moe_layers)),
        "moe_num_experts": model.moe.num_experts,
        "moe_top_k": model.moe.top_k,
        "moe_intermediate_size": model.moe.ffn_size,
        "share_expert_dim": model.moe.shared_ffn_size,
        "moe_router_scaling_factor": model.moe.scaling_factor,
        "swiglu_limits": [stage.limits.routed.get(n, 0.0) for n in range(len(kinds))],
        "swiglu_limits_shared": [stage.limits.shared.get(n, 0.0) for n in range(len(kinds))],
    }


def read_config(values: Mapping[str, Any]) -> tuple[ModelConfig, ReleasedStage]:
    """The inverse of `config_values`; keys that it does not write are not looked at.

    `loss_chunk` is no part of the format and gets its default.
    Raises `ExportError` where a key is missing, or describes another network.
    """
    reader = _ConfigReader(values)
    layers, heads = reader.integer("num_hidden_layers", at_least=1), reader.integer("num_nextn_predict_layers")
    reader.check_fixed()
    kinds = reader.kinds(layers, heads)
    num_dense = reader.num_dense_layers(layers)
    other = reader.section("attention_other_setting", ("num_attention_heads", "num_attention_groups", "head_dim"))
    if other["head_dim"] != reader["head_dim"]:
        raise ExportError(
            f"config.json: attention_other_setting.head_dim={other['head_dim']} differs from "
            f"head_dim={reader['head_dim']}; layers of both attention kinds must have the same"
        )
    limits = {"routed": "swiglu_limits", "shared": "swiglu_limits_shared"}
    moe_layers = range(num_dense, layers)
    share, theta = "partial_rotary_factors", "rope_theta"
    model = {
        "vocab_size": reader["vocab_size"],
        "hidden_size": reader["hidden_size"],
        "num_layers": layers,
        "layer_pattern": _pattern(kinds[:layers]),
        "head_dim": reader["head_dim"],
        "full": {
            "num_heads": reader["num_attention_heads"],
            "num_kv_heads": reader["num_attention_groups"],
            "rotary_share": reader.of_kind(share, kinds, "F", default=1.0),
        },
        "sliding": {
            "num_heads": other["num_attention_heads"],
            "num_kv_heads": other["num_attention_groups"],
            "rotary_share": reader.of_kind(share, kinds, "S", default=1.0),
            "window": reader["sliding_window"],
        },
        "num_dense_layers": num_dense,
        "ffn_size": reader["intermediate_size"],
        "moe": {
            "num_experts": reader["moe_num_experts"],
            "top_k": reader["moe_top_k"],
            "ffn_size": reader["moe_intermediate_size"],
            "shared_ffn_size": reader["share_expert_dim"],
            "scaling_factor": reader["moe_router_scaling_factor"],
        },
        "num_mtp_heads": heads,
        "norm_eps": reader["rms_norm_eps"],
        "init_std": values.get("initializer_range", 0.02),
        "max_positions": reader["max_position_embeddings"],
        "rope_scaling": reader.rope_scaling(),
    }
    stage = {
        "rope_theta_full": reader.of_kind(theta, kinds, "F", default=1e4),
        "rope_theta_sliding": reader.of_kind(theta, kinds, "S", default=1e4),
        "limits": {part: reader.limits(key, len(kinds), moe_layers) for part, key in limits.items()},
    }
    try:
        return decode(ModelConfig, model, "model"), decode(ReleasedStage, stage, "stage")
    except RecipeError as error:
        raise ExportError(f"config.json does not make a network: {error}") from error


class _ConfigReader:
    """config.json with errors that name the key."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise ExportError(f"config.json: the key {key} is missing; readers of this format need it")
        return self.values[key]

    def check_fixed(self) -> None:
        """Everything that is the same in all models of this kind."""
        for key, expected in FIXED.items():
            if self[key] != expected:
                raise ExportError(f"config.json: {key}={self[key]!r} is not supported; this network has {expected!r}")

    def integer(self, key: str, at_least: int = 0) -> int:
        value = self[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise ExportError(f"config.json: {key}={value!r} must be a whole number, at least {at_least}")
        return value

    def section(self, key: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
        """A nested mapping that has `keys`."""
        section = self[key]
        missing = [name for name in keys if not isinstance(section, Mapping) or name not in section]
        if missing:
            raise ExportError(
                f"config.json: {key} must be a section with {', '.join(keys)}; missing: {', '.join(missing)}"
            )
        return section

    def per_layer(self, key: str, lengths: tuple[int, ...]) -> list[Any]:
        """A list with an entry a layer."""
        items = self[key]
        if not isinstance(items, list) or len(items) not in lengths:
            found = len(items) if isinstance(items, list) else repr(items)
            wanted = " or ".join(map(str, sorted(set(lengths))))
            raise ExportError(f"config.json: {key} must be a list of {wanted} entries, one a layer; found {found}")
        return items

    def kinds(self, layers: int, heads: int) -> str:
        """Attention kinds, `F` and `S`, of the layers and the MTP heads."""
        letters = {name: kind for kind, name in LAYER_TYPES.items()}
        types = self.per_layer("layer_types", (layers + heads,))
        for n, name in enumerate(types):
            if name not in letters or (n >= layers and letters[name] != "S"):
                rule = "an MTP head, always sliding_attention" if n >= layers else f"one of {', '.join(letters)}"
                raise ExportError(f"config.json: layer_types[{n}]={name!r} must be {rule}")
        return "".join(letters[name] for name in types)

    def num_dense_layers(self, layers: int) -> int:
        """Leading layers that `moe_layers_enum` (text or list) leaves out; the others must all be there."""
        value = self["moe_layers_enum"]
        text = value if isinstance(value, str) else ",".join(map(str, value if isinstance(value, list) else [value]))
        parts = [part.strip() for part in text.split(",") if part.strip()]
        dense = layers - len(parts)
        if parts != [str(n) for n in range(max(dense, 0), layers)]:
            raise ExportError(
                f"config.json: moe_layers_enum={value!r} must name all layers from the first MoE layer to {layers - 1}"
            )
        if self["use_moe"] is not bool(parts):
            raise ExportError(f"config.json: use_moe={self['use_moe']!r} contradicts moe_layers_enum={value!r}")
        return dense

    def of_kind(self, key: str, kinds: str, kind: str, default: float) -> Any:
        """The value that all layers of an attention kind share; `default` where no layer is of that kind."""
        items = self.per_layer(key, (len(kinds), len(kinds) - self.integer("num_nextn_predict_layers")))
        found = [item for item, k in zip(items, kinds, strict=False) if k == kind] or [default]
        other = next((item for item in found if item != found[0]), None)
        if other is not None:
            raise ExportError(
                f"config.json: {key} has both {found[0]} and {other} among the {LAYER_TYPES[kind]} layers; "
                "it must be the same in all of them"
            )
        return found[0]

    def limits(self, key: str, layers: int, moe_layers: range) -> dict[str, Any]:
        """Activation limits by layer; 0 and null are no limit."""
        items = self.per_layer(key, (layers, layers - self.integer("num_nextn_predict_layers")))
        limits = {n: item for n, item in enumerate(items) if item}
        for n, item in limits.items():
            if n not in moe_layers:
                raise ExportError(
                    f"config.json: {key}[{n}]={item!r}, but layer {n} is not a MoE layer and has no limit"
                )
        return {str(n): item for n, item in limits.items()}

    def rope_scaling(self) -> dict[str, Any] | None:
        """The values of a `RopeScalingConfig`, or None."""
        if self["rope_scaling"] is None:
            return None
        names = {
            "factor": "factor",
            "original_max_position_embeddings": "original_max_positions",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
        }
        section = self.section("rope_scaling", ("rope_type", *names))
        if section["rope_type"] != "llama3":
            raise ExportError(
                f"config.json: rope_scaling.rope_type={section['rope_type']!r} is not supported; it must be 'llama3'"
            )
        return {ours: section[theirs] for theirs, ours in names.items()}


def _pattern(kinds: str) -> str:
    """The shortest pattern that repeats to `kinds`."""
    return next(kinds[:p] for p in range(1, len(kinds) + 1) if (kinds[:p] * len(kinds))[: len(kinds)] == kinds)
