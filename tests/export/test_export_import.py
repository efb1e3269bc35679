"""Import of what other tools write: bitwise where the numbers are the same, refused where the network is another
one."""

import json
import re
from pathlib import Path

import pytest
from hf_runs import change_config, change_tensors, fails, read_released, same_files
from safetensors.torch import save_file
from steptron.cli.main import main
from steptron.export.hf import export_hf, import_hf
from steptron.model.hf_config import FIXED
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextConfig


def saved_by_transformers(folder: Path) -> None:
    """Let transformers read the config and write it."""
    config = Step3p7TextConfig.from_pretrained(folder)
    (folder / "config.json").unlink()
    config.save_pretrained(folder)
    assert "rope_parameters" in json.loads((folder / "config.json").read_text())


def without_what_transformers_does_not_know(folder: Path) -> None:
    """Leave only the keys that a config made in transformers has."""
    saved_by_transformers(folder)
    change_config(folder, **dict.fromkeys(FIXED), **dict.fromkeys(("architectures", "use_moe", "yarn_only_types")))


def in_halves(folder: Path) -> None:
    """Move the tensors to two files with an index."""
    tensors = read_released(folder)
    (folder / "model.safetensors").unlink()
    where = {key: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, key in enumerate(sorted(tensors))}
    for name in set(where.values()):
        save_file({key: tensors[key] for key in tensors if where[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


ONE_THETA = {"rope_theta": [1e4] * 11, "swiglu_limits": [0.0] * 11, "swiglu_limits_shared": [0.0] * 11}
VARIANTS = {
    "lists of the backbone": lambda folder: change_config(
        folder,
        **{key: value[:9] for key, value in json.loads((folder / "config.json").read_text()).items() if key in LISTS},
    ),
    "no zero_centered, no architectures": lambda folder: change_config(folder, zero_centered=None, architectures=None),
    "saved by transformers": saved_by_transformers,
    "made in transformers": without_what_transformers_does_not_know,
    "two files": in_halves,
}
LISTS = ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared")


@pytest.mark.parametrize("vary", VARIANTS.values(), ids=VARIANTS.keys())
def test_what_others_write_comes_in_bitwise(released, damaged, tmp_path, vary):
    vary(damaged)
    import_hf(damaged, tmp_path / "in")
    export_hf(tmp_path / "in", tmp_path / "out")
    assert same_files(released, tmp_path / "out")


@pytest.mark.parametrize("key", ["rope_theta", "swiglu_limits"])
def test_a_short_form_comes_in_bitwise(damaged, tmp_path, key):
    """One theta for all layers, and no lists of limits, beside the lists that say the same."""
    change_config(damaged, **ONE_THETA)
    import_hf(damaged, tmp_path / "long")
    change_config(
        damaged, **({key: 1e4} if key == "rope_theta" else {"swiglu_limits": None, "swiglu_limits_shared": None})
    )
    import_hf(damaged, tmp_path / "short")
    for name in ("long", "short"):
        export_hf(tmp_path / name, tmp_path / f"{name}-out")
    assert same_files(tmp_path / "long-out", tmp_path / "short-out")


def test_half_precision_comes_in_bitwise(damaged, tmp_path):
    halves = {key: tensor.half() for key, tensor in read_released(damaged).items()}
    save_file(halves, damaged / "model.safetensors", metadata={"format": "pt"})
    import_hf(damaged, tmp_path / "in")
    export_hf(tmp_path / "in", tmp_path / "out", "fp32")
    for key, tensor in read_released(tmp_path / "out").items():
        assert tensor.equal(halves[key].float()), key


HEAD = re.compile(r"model\.layers\.(9|10)\.")


@pytest.mark.parametrize("heads", [0, 1])
def test_missing_heads_are_left_out_by_the_option_that_the_error_names(damaged, tmp_path, capsys, heads):
    kept = {key: t for key, t in read_released(damaged).items() if not (m := HEAD.match(key)) or int(m[1]) < 9 + heads}
    save_file(kept, damaged / "model.safetensors", metadata={"format": "pt"})
    message = fails(capsys, "import", "hf", damaged, tmp_path / "in")
    assert "num_nextn_predict_layers=2" in message
    assert f"the tensors of {heads} MTP heads" in message
    option = message.rsplit("take those alone with ", 1)[1].split()
    assert option == ["--mtp-heads", str(heads)]
    assert main(["import", "hf", str(damaged), str(tmp_path / "in"), *option]) == 0
    export_hf(tmp_path / "in", tmp_path / "out")
    tensors = read_released(tmp_path / "out")
    assert tensors.keys() == kept.keys()
    assert all(tensors[key].equal(kept[key]) for key in kept)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == heads


def test_a_head_that_lacks_one_tensor_is_no_head(damaged, tmp_path, capsys):
    change_tensors(damaged, lambda t: t.pop("model.layers.10.eh_proj.weight"))
    message = fails(capsys, "import", "hf", damaged, tmp_path / "in")
    assert "model.layers.10.eh_proj.weight is missing" in message
    assert "--mtp-heads 1" in message
    assert main(["import", "hf", str(damaged), str(tmp_path / "in"), "--mtp-heads", "1"]) == 0


def test_other_networks_are_refused_and_nothing_is_left(damaged, tmp_path, capsys):
    other = {
        "sink": True,
        "use_rope_layers": [False] * 9,
        "true_head_dim": 16,
        "hidden_act": "gelu",
        "attention_bias": True,
        "tie_word_embeddings": True,
        "moe_every_n_layer": 2,
        "logit_softcap": 30.0,
    }
    original = (damaged / "config.json").read_text()
    for key, value in other.items():
        change_config(damaged, **{key: value})
        assert f"config.json: {key}={value!r} is not" in fails(capsys, "import", "hf", damaged, tmp_path / "in")
        (damaged / "config.json").write_text(original)
