"""Export and import: bit for bit there and back, files of a limited size, and an error of one line for what is not
whole."""

import json
import os
import shutil
from pathlib import Path

import pytest
import steptron.export.hf as hf
import torch
import yaml
from hf_runs import MODEL, change_tensors, fails, read_released, same_files, stage, write_run
from steptron.checkpoint.load import load
from steptron.checkpoint.manifest import read_manifest
from steptron.cli.main import main
from steptron.config.decode import decode
from steptron.config.resolve import resolve
from steptron.config.schema import ModelConfig
from steptron.export.hf import FILE_BYTES, export_hf, import_hf, plan_files
from steptron.model.hf_config import ReleasedStage, released_stage
from steptron.model.hf_map import tensor_table

BIASES = [f"model.layers.{n}.moe.router_bias" for n in range(1, 9)]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("file_bytes", [FILE_BYTES, 400_000], ids=["one file", "several files"])
def test_export_import_export_is_bitwise(run, model, tmp_path, precision, file_bytes):
    first = export_hf(run, tmp_path / "first", precision, file_bytes)
    import_hf(tmp_path / "first", tmp_path / "imported")
    again = export_hf(tmp_path / "imported", tmp_path / "again", precision, file_bytes)
    assert same_files(tmp_path / "first", tmp_path / "again")
    assert (first.step, again.step) == (7, 0)
    assert (first.files > 1) == (file_bytes < FILE_BYTES)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    tensors, state = read_released(tmp_path / "first"), model.state_dict()
    for entry in tensor_table(MODEL):
        expected = state[entry.name] if entry.key in BIASES else state[entry.name].to(dtype)
        assert tensors.pop(entry.key).equal(expected), entry.key
    assert not tensors


def test_router_biases_stay_fp32(released, model):
    tensors = read_released(released)
    assert [key for key, tensor in tensors.items() if tensor.dtype == torch.float32] == sorted(BIASES)
    bias = model.layers["8"].moe.router.bias
    assert tensors[BIASES[-1]].equal(bias)
    assert not bias.equal(bias.bfloat16().float())


def test_what_is_imported_loads_into_a_model_that_trains_in_fp32(released, model, tmp_path):
    written = import_hf(released, tmp_path / "imported")
    assert written.tensors == len(model.state_dict())
    checkpoint = tmp_path / "imported" / "checkpoints" / "step-00000000"
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.counters["tokens"], manifest.counters["stage"]) == (0, 0, "")
    values = {f"model.{name}": torch.full_like(tensor, 9.0) for name, tensor in model.state_dict().items()}
    load(checkpoint, values)
    for name, tensor in model.state_dict().items():
        expected = tensor if name.endswith("router.bias") else tensor.bfloat16().float()
        assert values[f"model.{name}"].equal(expected), name


def test_an_import_brings_its_recipe_fragments_and_the_tokenizer(released, run, tmp_path):
    assert import_hf(released, tmp_path / "imported").tokenizer
    fragments = {
        name: yaml.safe_load((tmp_path / "imported" / f"{name}.yaml").read_text()) for name in ("model", "stage")
    }
    assert decode(ModelConfig, fragments["model"]) == MODEL
    assert decode(ReleasedStage, fragments["stage"]) == released_stage(stage())
    original = (run / "corpus" / "tokenizer.json").read_bytes()
    assert (released / "tokenizer.json").read_bytes() == original
    assert (tmp_path / "imported" / "tokenizer.json").read_bytes() == original


def test_an_imported_model_is_a_file_of_the_model_group(released, tmp_path):
    import_hf(released, tmp_path / "imported")
    recipes = Path(shutil.copytree(Path(hf.__file__).parents[2] / "recipes", tmp_path / "recipes"))
    shutil.copy(tmp_path / "imported" / "model.yaml", recipes / "model" / "imported.yaml")
    assert (
        resolve("demo", ["model=imported", "model.max_positions=4096", "~model.rope_scaling"], recipes).model.head_dim
        == 32
    )


def test_files_stay_below_the_limit(run, tmp_path):
    written = export_hf(run, tmp_path / "out", file_bytes=400_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written.bytes
    assert sorted(set(index["weight_map"].values())) == [
        f"model-{n:05d}-of-{written.files:05d}.safetensors" for n in range(1, written.files + 1)
    ]
    sizes = {}
    for key, tensor in read_released(tmp_path / "out").items():
        name = index["weight_map"].pop(key)
        sizes[name] = sizes.get(name, 0) + tensor.nbytes
    assert not index["weight_map"]
    assert max(sizes.values()) <= 400_000
    assert sum(sizes.values()) == written.bytes


def test_one_file_of_tensors_is_in_memory_at_a_time(run, tmp_path, monkeypatch):
    asked, read = [], hf.load_part

    def watched(checkpoint, tensors):
        asked.append(sum(tensor.nbytes for tensor in tensors.values()))
        read(checkpoint, tensors)

    monkeypatch.setattr(hf, "load_part", watched)
    written = export_hf(run, tmp_path / "out", "fp32", file_bytes=400_000)
    assert len(asked) == written.files > 10
    assert max(asked) <= 400_000


def test_flash_in_files_of_5_gb_without_weights():
    table = tensor_table(resolve("step3p5_flash").model)
    files = plan_files(table, "bf16", FILE_BYTES)
    assert [entry for entries in files.values() for entry in entries] == list(table)
    sizes = [sum(torch.Size(e.shape).numel() * (4 if e.fp32 else 2) for e in entries) for entries in files.values()]
    assert sum(sizes) == 398_768_626_944
    assert max(sizes) <= 5_000_000_000
    assert next(iter(files)) == f"model-00001-of-{len(files):05d}.safetensors"


def test_a_tensor_above_the_limit_has_a_file_of_its_own():
    table = tensor_table(MODEL)
    files = plan_files(table, "fp32", 1)
    assert [len(entries) for entries in files.values()] == [1] * len(table)


@pytest.mark.filterwarnings("error::UserWarning")
def test_commands_say_what_they_wrote_and_nothing_else(run, tmp_path, capfd):
    older = run / "checkpoints" / "step-00000003"
    assert main(["export", "hf", str(older), str(tmp_path / "out")]) == 0
    assert main(["import", "hf", str(tmp_path / "out"), str(tmp_path / "in")]) == 0
    captured = capfd.readouterr()
    exported, imported = captured.out.splitlines()
    assert exported.startswith(
        f"{tmp_path / 'out'}: step 3, bf16; 185 tensors, 0.00355 GB, 1 file(s); with tokenizer.json"
    )
    assert imported.startswith(f"{tmp_path / 'in'}: checkpoints/step-00000000")
    assert captured.err == ""


def test_no_tokenizer_is_no_error(model, tmp_path):
    run = write_run(tmp_path / "run", model, stage())
    (run / "corpus" / "tokenizer.json").unlink()
    assert not export_hf(run, tmp_path / "out").tokenizer
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_files_have_the_permissions_of_new_files(run, tmp_path, mask):
    before = os.umask(mask)
    try:
        export_hf(run, tmp_path / "out", file_bytes=400_000)
        import_hf(tmp_path / "out", tmp_path / "in")
    finally:
        os.umask(before)
    files = [path for name in ("out", "in") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}


def test_a_folder_that_exists_is_not_touched(run, released, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert f"OUT={tmp_path / 'out'} exists" in fails(capsys, "export", "hf", run, tmp_path / "out")
    assert f"OUT={tmp_path / 'out'} exists" in fails(capsys, "import", "hf", released, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_what_is_no_checkpoint_is_named(tmp_path, capsys):
    assert "nothing: no such folder" in fails(capsys, "export", "hf", tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "no complete checkpoint" in fails(capsys, "export", "hf", tmp_path / "run", tmp_path / "out")


def test_a_cut_checkpoint_is_not_exported(model, tmp_path, capsys):
    run = write_run(tmp_path / "run", model, stage(), steps=(3, 7))
    newest = run / "checkpoints" / "step-00000007"
    largest = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    assert largest.name in fails(capsys, "export", "hf", newest, tmp_path / "out")
    assert export_hf(run, tmp_path / "out").step == 3


def test_a_checkpoint_of_another_model_is_not_exported(model, tmp_path, capsys):
    run = write_run(tmp_path / "run", model, stage())
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("num_layers: 9", "num_layers: 10"))
    assert "layers.9." in fails(capsys, "export", "hf", run, tmp_path / "out")
    (run / "recipe.yaml").write_text(text.replace("ffn_size: 160", "ffn_size: 161"))
    assert "layers.0.mlp" in fails(capsys, "export", "hf", run, tmp_path / "out")


def test_a_stage_that_the_recipe_lost_is_named(model, tmp_path, capsys):
    run = write_run(tmp_path / "run", model, stage())
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("  last:", "  other:"))
    assert "stage 'last'" in fails(capsys, "export", "hf", run, tmp_path / "out")


NORM = "model.norm.weight"
SPOILT = {
    "missing tensor": (lambda t: t.pop(NORM), f"{NORM} is missing"),
    "unknown tensor": (
        lambda t: t.update({"model.norm.bias": torch.zeros(2)}),
        "model.norm.bias is not part of this network",
    ),
    "another shape": (
        lambda t: t.update({NORM: torch.zeros(95)}),
        rf"{NORM} has the shape [95], config.json asks for [96]",
    ),
    "NaN": (lambda t: t[NORM].view(-1)[7:8].fill_(float("nan")), f"{NORM} holds NaN or an infinite value"),
    "infinite": (lambda t: t[NORM].view(-1)[7:8].fill_(-float("inf")), f"{NORM} holds NaN or an infinite value"),
    "another type": (
        lambda t: t.update({NORM: t[NORM].double()}),
        f"{NORM} has the type F64; known are F32, BF16, F16",
    ),
}


@pytest.mark.parametrize(("change", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_tensors_that_do_not_fit_are_named(damaged, tmp_path, capsys, change, message):
    change_tensors(damaged, change)
    assert message in fails(capsys, "import", "hf", damaged, tmp_path / "in")


def test_files_that_are_not_whole_are_named(run, damaged, tmp_path, capsys):
    config = json.loads((damaged / "config.json").read_text())
    del config["head_dim"]
    (damaged / "config.json").write_text(json.dumps(config))
    assert "config.json: the key head_dim is missing" in fails(capsys, "import", "hf", damaged, tmp_path / "in")
    (damaged / "config.json").write_text("{")
    assert "config.json is not JSON" in fails(capsys, "import", "hf", damaged, tmp_path / "in")
    (damaged / "config.json").unlink()
    assert "config.json cannot be read" in fails(capsys, "import", "hf", damaged, tmp_path / "in")
    export_hf(run, tmp_path / "parts", file_bytes=400_000)
    part = sorted((tmp_path / "parts").glob("model-00002-of-*"))[0]
    with part.open("r+b") as file:
        file.truncate(100)
    assert f"{part} is not a complete safetensors file" in fails(
        capsys, "import", "hf", tmp_path / "parts", tmp_path / "in"
    )
    part.unlink()
    assert f"{part} is missing" in fails(capsys, "import", "hf", tmp_path / "parts", tmp_path / "in")


def test_a_disk_that_is_full_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "save_file", full)
    assert "No space left on device" in fails(capsys, "export", "hf", run, tmp_path / "out")


def test_what_a_killed_export_left_is_cleared(run, tmp_path):
    (tmp_path / ".tmp-out").mkdir()
    (tmp_path / ".tmp-out" / "model-00001-of-00009.safetensors").write_text("half")
    export_hf(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
