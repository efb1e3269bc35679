"""Conversion of a config.json saved by transformers to the keys of the released format.

transformers has this network as `Step3p7TextConfig`. It gives some keys other names, keeps one RoPE section per
attention kind where the released format has lists by layer, and keeps the MTP heads' entries in lists of their own.
"""

from collections.abc import Mapping
from typing import Any

from steptron.errors import ExportError

RENAMED = {
    "num_key_value_heads": "num_attention_groups",
    "n_routed_experts": "moe_num_experts",
    "num_local_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_top_k",
    "num_mtp_layers": "num_nextn_predict_layers",
    "share_expert_dims": "share_expert_dim",
}
"""Maps keys of transformers to keys of the released format."""
SPLIT = {"layer_types": "mtp_layer_types", "mlp_layer_types": "mtp_mlp_layer_types"}
"""Maps each list of the layers to the list in which transformers keeps the entries of the MTP heads."""
FULL, SLIDING = "full_attention", "sliding_attention"


def released_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values under the released keys; a config in the released format is returned unchanged.

    Raises `ExportError` if two keys contradict each other, or if a value has another form than transformers writes.
    """
    found = dict(values)
    try:
        for theirs, ours in RENAMED.items():
            if found.get(theirs) is not None:
                _agree(found, ours, found.pop(theirs), theirs)
        if "rope_parameters" in found:
            _from_transformers(found)
    except (TypeError, AttributeError, KeyError) as error:
        raise ExportError(
            f"config.json has the keys of transformers' Step3p7TextConfig, but not its form ({error!r}); save it again"
        ) from error
    return found


def _from_transformers(found: dict[str, Any]) -> None:
    """Replace the values that transformers keeps in another form."""
    for layers, heads in SPLIT.items():
        found[layers] = [*found[layers], *(found.pop(heads, None) or [])]
    _moe_layers(found, found.pop("mlp_layer_types"))
    _rope(found, found.pop("rope_parameters"))
    _sliding_heads(found, found.pop("num_sliding_attention_heads"))
    _check_layers(found, found.pop("per_layer_config", None))
    # transformers writes this key only if it has read it: its class has no other router.
    found.setdefault("moe_router_activation", "sigmoid")


def _agree(found: dict[str, Any], key: str, value: Any, name: str) -> None:
    """Set a key. Raises `ExportError` if the key already has another value."""
    if found.get(key, value) != value:
        raise ExportError(f"config.json: {name} says {key}={value!r}, but {key}={found[key]!r}; remove the wrong one")
    found[key] = value


def _moe_layers(found: dict[str, Any], kinds: list[str]) -> None:
    """Set `moe_layers_enum` from `mlp_layer_types`."""
    layers = kinds[: found.get("num_hidden_layers")]
    for n, kind in enumerate(kinds):
        if kind not in ("dense", "sparse") or (n >= len(layers) and kind != "dense"):
            rule = "'dense' or 'sparse'" if n < len(layers) else "'dense', because it is an MTP head"
            raise ExportError(f"config.json: mlp_layer_types[{n}]={kind!r} must be {rule}")
    _agree(found, "moe_layers_enum", ",".join(str(n) for n, k in enumerate(layers) if k == "sparse"), "mlp_layer_types")


def _rope(found: dict[str, Any], parameters: Any) -> None:
    """Set `rope_theta`, `partial_rotary_factors` and `rope_scaling` from the RoPE sections of both attention kinds."""
    kinds = found["layer_types"]
    missing = sorted({*kinds} - parameters.keys())
    if missing:
        raise ExportError(
            f"config.json: rope_parameters has no section {missing[0]}, which layer_types names; save it again"
        )
    sections = {kind: dict(section) for kind, section in parameters.items()}
    for plural, key, default in (
        ("rope_theta", "rope_theta", None),
        ("partial_rotary_factors", "partial_rotary_factor", 1.0),
    ):
        by_kind = {kind: section.pop(key, default) for kind, section in sections.items()}
        _agree(found, plural, [by_kind[kind] for kind in kinds], "rope_parameters")
    default = {"rope_type": "default"}
    scaling, sliding = sections.get(FULL, default), sections.get(SLIDING, default)
    if sliding != default:
        raise ExportError(
            f"config.json: rope_parameters.{SLIDING}={sliding!r} is not supported, "
            "because only full layers scale RoPE; import a model that does so"
        )
    _agree(found, "rope_scaling", None if scaling == default else scaling, "rope_parameters")
    found.setdefault("yarn_only_types", [FULL])


def _sliding_heads(found: dict[str, Any], heads: int) -> None:
    """Set `attention_other_setting`; apart from the number of heads, its values are those of the full layers."""
    setting = {
        "attention_type": SLIDING,
        "num_attention_heads": heads,
        "num_attention_groups": found["num_attention_groups"],
        "head_dim": found["head_dim"],
    }
    there = found.get("attention_other_setting") or {}
    _agree(found, "attention_other_setting", there | setting, "num_sliding_attention_heads")


def _check_layers(found: dict[str, Any], layers: dict[str, Any] | None) -> None:
    """Check that `per_layer_config` agrees with `num_sliding_attention_heads`."""
    kinds = found["layer_types"][: found["num_hidden_layers"]]
    setting = {"num_attention_heads": found["attention_other_setting"]["num_attention_heads"]}
    expected = {str(n): setting for n, kind in enumerate(kinds) if kind == SLIDING}
    if layers is not None and {str(n): value for n, value in layers.items()} != expected:
        raise ExportError(
            f"config.json: per_layer_config={layers!r} must give the sliding layers {setting} and nothing else; "
            "import a model that does so"
        )
