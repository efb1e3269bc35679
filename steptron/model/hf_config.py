"""Conversion between our configuration and config.json of the released checkpoint format.

    ModelConfig, ReleasedStage ──config_values──▶ config.json ──read_config──▶ ModelConfig, ReleasedStage

In that format, MTP head h is layer num_layers + h. Lists by layer are written with entries for the heads; when read,
they may lack them. A layer without an activation limit has the limit 0 or null. An unknown key is refused, because it
may change what the network computes; `HARMLESS` lists the keys that do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steptron.config.decode import decode
from steptron.config.schema import LimitsConfig, ModelConfig, Precision, StageConfig, layer_kinds
from steptron.errors import ExportError, RecipeError
from steptron.model.hf_transformers import released_names

LAYER_TYPES = {"F": "full_attention", "S": "sliding_attention"}
DTYPES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16"}
ARCHITECTURES = ("Step3p5ForCausalLM", "Step3p7TextModel")
"""Names of this network in the released code and in transformers."""

NEEDED = {"model_type": "step3p5", "moe_router_activation": "sigmoid"}
"""Values that config.json must have: without them, other readers assume another value."""
FIXED = {
    "att_impl_type": "GQA",
    "use_qk_norm": True,
    "use_head_wise_attn_gate": True,
    "norm_expert_weight": True,
    "use_moe_router_bias": True,
    "need_fp32_gate": True,
    "zero_centered": True,
    "tie_word_embeddings": False,
}
"""Values that are written. In reading, an absent or null key has this value, or else the tensors do not fit."""
ABSENT = {
    "attention_bias": False,
    "attention_dropout": 0,
    "gating": True,
    "hidden_act": "silu",
    "mlp_bias": False,
    "moe_every_n_layer": 1,
    "moe_layer_offset": 0,
    "sink": False,
    "use_bidirectional_attention": False,
    "use_mfa": False,
}
"""Values that are not written. A key with any other value describes another network."""
HARMLESS = frozenset({
    *("_attn_implementation", "_name_or_path", "architectures", "auto_map", "chunk_size_feed_forward", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "is_encoder_decoder", "max_seq_len"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "problem_type", "return_dict"),
    *("torch_dtype", "transformers_version", "use_cache"),
})  # fmt: skip
"""Keys that name things or select outputs, but do not change what the network computes."""
READ = frozenset({
    *("num_hidden_layers", "num_nextn_predict_layers", "vocab_size", "hidden_size", "intermediate_size", "head_dim"),
    *("layer_types", "sliding_window", "num_attention_heads", "num_attention_groups", "attention_other_setting"),
    *("rope_theta", "partial_rotary_factors", "rope_scaling", "yarn_only_types", "use_rope_layers", "true_head_dim"),
    *("use_moe", "moe_layers_enum", "moe_num_experts", "moe_top_k", "moe_intermediate_size", "share_expert_dim"),
    *("moe_router_scaling_factor", "swiglu_limits", "swiglu_limits_shared", "rms_norm_eps", "initializer_range"),
    *("max_position_embeddings", "query_pre_attn_scalar"),
})  # fmt: skip
"""Keys that `read_config` reads."""


@dataclass(frozen=True, kw_only=True)
class ReleasedStage:
    """The part of a stage that changes what the network computes, and which config.json therefore holds."""

    rope_theta_full: float
    """RoPE base of the full layers."""
    rope_theta_sliding: float
    """RoPE base of the sliding layers."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Activation limits of the MoE layers."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Token ids that other tools read from config.json."""

    bos: int | None = None
    """The token that starts a text; None if texts start without one."""
    eos: int | list[int] | None = None
    """The token, or list of tokens, that ends a text; None if unknown."""
    pad: int | None = None
    """The token that pads a batch; None if unknown. transformers does not train its embedding."""

    def values(self) -> dict[str, Any]:
        """Return the keys for config.json and generation_config.json."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


def released_stage(stage: StageConfig) -> ReleasedStage:
    """Return the part of the last stage that an exported model keeps."""
    return ReleasedStage(
        rope_theta_full=stage.rope_theta_full, rope_theta_sliding=stage.rope_theta_sliding, limits=stage.limits
    )


def config_values(
    model: ModelConfig, stage: ReleasedStage, precision: Precision, tokens: SpecialTokens | None = None
) -> dict[str, Any]:
    """Return the values of config.json: all keys that readers of the released model need.

    Raises `ExportError` if the network has a feature for which the released format has no key.
    """
    if model.moe.route_groups > 1:
        raise ExportError(
            f"model.moe.route_groups={model.moe.route_groups} cannot be exported: the released format has no route "
            "groups; only a network with 1 can be exported"
        )
    kinds = layer_kinds(model) + "S" * model.num_mtp_heads
    moe_layers = range(model.num_dense_layers, model.num_layers)
    full, sliding, scaling = model.full, model.sliding, model.rope_scaling
    fixed = NEEDED | FIXED | {"architectures": [ARCHITECTURES[0]], "yarn_only_types": [LAYER_TYPES["F"]]}
    return fixed | {
        "torch_dtype": DTYPES[precision],
        **(tokens or SpecialTokens()).values(),
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


def read_config(values: Mapping[str, Any], mtp_heads: int | None = None) -> tuple[ModelConfig, ReleasedStage]:
    """Return the model and stage that config.json describes: the inverse of `config_values`.

    A config saved by transformers is read too. `mtp_heads` is the number of MTP heads to take, counted from the first;
    None takes all. `loss_chunk` is not part of the format and gets its default. Raises `ExportError` if a key is
    missing, unknown, or describes another network.
    """
    reader = _ConfigReader(values)
    reader.check("model_type", reader["model_type"], NEEDED["model_type"])
    reader = _ConfigReader(released_names(values))
    reader.check_network()
    layers, heads = reader.integer("num_hidden_layers", at_least=1), reader.heads(mtp_heads)
    kinds = reader.kinds(layers, heads)
    num_dense = reader.num_dense_layers(layers)
    other = reader.sliding_attention()
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
        raise ExportError(f"config.json does not describe a network: {error}") from error


class _ConfigReader:
    """config.json under the released keys, with errors that name the key."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise ExportError(f"config.json: the key {key} is missing; readers of this format need it")
        return self.values[key]

    def check_network(self) -> None:
        """Check the values that all models of this kind share, and that no key is unknown."""
        for key, expected in NEEDED.items():
            self.check(key, self[key], expected)
        for key, expected in (FIXED | ABSENT).items():
            self.check(key, self.values.get(key), expected, null=True)
        names = self.values.get("architectures") or []
        if not isinstance(names, list) or any(name not in ARCHITECTURES for name in names):
            self.check("architectures", names, [ARCHITECTURES[0]])
        for key in ("true_head_dim", "query_pre_attn_scalar"):
            self.check(key, self.values.get(key), self["head_dim"], null=True)
        used = self.values.get("use_rope_layers") or []
        if not isinstance(used, list) or not all(used):
            self.check("use_rope_layers", used, [])
        known = NEEDED.keys() | FIXED.keys() | ABSENT.keys() | HARMLESS | READ
        for key, value in self.values.items():
            if key not in known and value is not None:
                raise ExportError(
                    f"config.json: {key}={value!r} is not known here and may change what the network computes; "
                    f"remove {key} from config.json if it does not"
                )

    def check(self, key: str, value: Any, expected: Any, null: bool = False) -> None:
        """Refuse a value that describes another network; with `null`, None counts as the expected value."""
        if value != expected and not (null and value is None):
            raise ExportError(
                f"config.json: {key}={value!r} is not supported, because this network has {expected!r}; "
                "import a model that has it"
            )

    def integer(self, key: str, at_least: int = 0) -> int:
        value = self[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise ExportError(f"config.json: {key}={value!r} must be a whole number, at least {at_least}")
        return value

    def heads(self, wanted: int | None) -> int:
        """Return the number of MTP heads to take."""
        there = self.integer("num_nextn_predict_layers")
        if wanted is not None and not 0 <= wanted <= there:
            raise ExportError(
                f"--mtp-heads={wanted} must be from 0 to config.json's num_nextn_predict_layers={there}; "
                "leave it out to take all heads"
            )
        return there if wanted is None else wanted

    def section(self, key: str, needed: tuple[str, ...], others: tuple[str, ...] = ()) -> Mapping[str, Any]:
        """Return a nested mapping that has all keys of `needed`, perhaps some of `others`, and no more."""
        section = self[key]
        missing = [name for name in needed if not isinstance(section, Mapping) or name not in section]
        if missing:
            raise ExportError(
                f"config.json: {key} must be a section with {', '.join(needed)}; missing: {', '.join(missing)}"
            )
        for name, value in section.items():
            if name not in (*needed, *others) and value is not None:
                raise ExportError(
                    f"config.json: {key}.{name}={value!r} is not known here and may change what the network computes; "
                    f"remove it from config.json if it does not"
                )
        return section

    def sliding_attention(self) -> Mapping[str, Any]:
        """Return the settings of the sliding layers."""
        key = "attention_other_setting"
        needed = ("num_attention_heads", "num_attention_groups", "head_dim")
        other = self.section(key, needed, ("attention_type", "true_head_dim"))
        self.check(f"{key}.attention_type", other.get("attention_type"), LAYER_TYPES["S"], null=True)
        for name in ("head_dim", "true_head_dim"):
            if other.get(name) not in (self["head_dim"], None):
                raise ExportError(
                    f"config.json: {key}.{name}={other[name]} differs from head_dim={self['head_dim']}; "
                    "layers of both attention kinds must have the same"
                )
        return other

    def per_layer(self, key: str) -> list[Any]:
        """Return a list with one entry per layer, and perhaps more for the MTP heads."""
        items = self[key]
        layers = self.integer("num_hidden_layers")
        padded = layers + self.integer("num_nextn_predict_layers")
        if not isinstance(items, list) or not (len(items) == layers or len(items) >= padded):
            found = len(items) if isinstance(items, list) else repr(items)
            wanted = " or ".join(map(str, sorted({layers, padded})))
            raise ExportError(f"config.json: {key} must be a list of {wanted} entries, one per layer; found {found}")
        return items

    def kinds(self, layers: int, heads: int) -> str:
        """Return the attention kinds, `F` and `S`, of the layers and of the MTP heads to take."""
        letters = {name: kind for kind, name in LAYER_TYPES.items()}
        types = self.per_layer("layer_types")[: layers + heads]
        for n, name in enumerate(types):
            if name not in letters or (n >= layers and letters[name] != "S"):
                rule = "an MTP head, always sliding_attention" if n >= layers else f"one of {', '.join(letters)}"
                raise ExportError(f"config.json: layer_types[{n}]={name!r} must be {rule}")
        return "".join(letters[name] for name in types[:layers]) + "S" * heads

    def num_dense_layers(self, layers: int) -> int:
        """Return the number of leading layers that `moe_layers_enum` (text or list) leaves out.

        Raises `ExportError` unless it names all other layers.
        """
        value = self["moe_layers_enum"]
        text = value if isinstance(value, str) else ",".join(map(str, value if isinstance(value, list) else [value]))
        parts = [part.strip() for part in text.split(",") if part.strip()]
        dense = layers - len(parts)
        if parts != [str(n) for n in range(max(dense, 0), layers)]:
            raise ExportError(
                f"config.json: moe_layers_enum={value!r} must name all layers from the first MoE layer to {layers - 1}"
            )
        if self.values.get("use_moe") not in (bool(parts), None):
            raise ExportError(
                f"config.json: use_moe={self.values['use_moe']!r} contradicts moe_layers_enum={value!r}; "
                "correct one of them"
            )
        return dense

    def of_kind(self, key: str, kinds: str, kind: str, default: float) -> Any:
        """Return the value that all layers of an attention kind share, or `default` if no layer is of that kind."""
        if isinstance(self[key], int | float):
            return self[key]
        found = [item for item, k in zip(self.per_layer(key), kinds, strict=False) if k == kind]
        if not found and kind in kinds:
            raise ExportError(
                f"config.json: {key} has no entry for a {LAYER_TYPES[kind]} layer, which the MTP heads need; "
                "add entries for them, or leave the heads out with --mtp-heads 0"
            )
        other = next((item for item in found if item != found[0]), None)
        if other is not None:
            raise ExportError(
                f"config.json: {key} has both {found[0]} and {other} among the {LAYER_TYPES[kind]} layers; "
                "it must be the same in all of them"
            )
        return found[0] if found else default

    def limits(self, key: str, layers: int, moe_layers: range) -> dict[str, Any]:
        """Return the activation limits by layer; 0, null or an absent list means no limit."""
        if self.values.get(key) is None:
            return {}
        limits = {n: item for n, item in enumerate(self.per_layer(key)[:layers]) if item}
        for n, item in limits.items():
            if n not in moe_layers:
                raise ExportError(
                    f"config.json: {key}[{n}]={item!r}, but layer {n} is not a MoE layer and has no limit; it must be 0"
                )
        return {str(n): item for n, item in limits.items()}

    def rope_scaling(self) -> dict[str, Any] | None:
        """Return the values of a `RopeScalingConfig`, or None."""
        if self["rope_scaling"] is None:
            return None
        self.check("yarn_only_types", self["yarn_only_types"], [LAYER_TYPES["F"]])
        names = {
            "factor": "factor",
            "original_max_position_embeddings": "original_max_positions",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
        }
        section = self.section("rope_scaling", ("rope_type", *names))
        self.check("rope_scaling.rope_type", section["rope_type"], "llama3")
        return {ours: section[theirs] for theirs, ours in names.items()}


def _pattern(kinds: str) -> str:
    """Return the shortest pattern that repeats to `kinds`."""
    return next(kinds[:p] for p in range(1, len(kinds) + 1) if (kinds[:p] * len(kinds))[: len(kinds)] == kinds)
