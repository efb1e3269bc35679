"""Small run folders to export, and the exported model in transformers, which knows nothing of this project."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from steptron.checkpoint.coordinator import ALONE
from steptron.checkpoint.retention import Retention
from steptron.checkpoint.save import save
from steptron.checkpoint.staging import pieces_of
from steptron.cli.main import main
from steptron.config.resolve import to_yaml
from steptron.config.schema import (
    AttentionConfig,
    LimitsConfig,
    LrConfig,
    MoeConfig,
    Recipe,
    RopeScalingConfig,
    StageConfig,
)
from steptron.data.tokenizer import EOS
from steptron.model.init import initialise
from steptron.model.transformer import Transformer, apply_stage
from steptron.train.counters import Counters
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextConfig, Step3p7TextModel

from tiny import tiny_model, tiny_recipe

MODEL = tiny_model(
    vocab_size=120,
    hidden_size=96,
    num_layers=9,
    layer_pattern="FSSS",
    head_dim=32,
    sliding=AttentionConfig(num_heads=6, num_kv_heads=2, window=16),
    ffn_size=160,
    moe=MoeConfig(num_experts=8, top_k=3, ffn_size=48, shared_ffn_size=64, scaling_factor=3.0),
    init_std=0.05,
    max_positions=256,
    rope_scaling=RopeScalingConfig(factor=4.0, original_max_positions=64, low_freq_factor=1.0, high_freq_factor=4.0),
    loss_chunk="auto",
)
"""Three full layers, one dense, two MTP heads; full layers rotate half of the channels at scaled frequencies."""

RENAMES = {
    r"^model\.": "",
    r"\.moe\.gate\.": ".mlp.gate.",
    r"\.moe\.router_bias$": ".mlp.gate.e_score_correction_bias",
    r"\.moe\.(\w+_proj)\.weight$": r".mlp.experts.\1",
    r"\.share_expert\.": ".mlp.shared_experts.",
}
"""From released keys to those of transformers, which also joins gate and up of the experts."""

LIMITS = LimitsConfig(routed={3: 0.03, 8: 0.01}, shared={1: 0.04, 8: 0.02})


def stage(**changes) -> StageConfig:
    """The stage that a checkpoint comes from."""
    values = {"tokens": 1000, "seq_len": 64, "batch_size": 1, "mix": {"prose": 1.0}, "lr": LrConfig(peak=1e-3)}
    values |= {"rope_theta_full": 5e6, "rope_theta_sliding": 1e4, "limits": LIMITS}
    return StageConfig(**(values | changes))


def random_model(last: StageConfig, seed: int = 0) -> Transformer:
    """The network with nothing at zero that training would move, ready to run in the stage `last`."""
    model = Transformer(MODEL)
    initialise(model, seed, MODEL.init_std)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * (0.1 if "router" in name else 0.2))
    apply_stage(model, last, num_groups=1)
    return model.eval()


def write_run(run: Path, model: Transformer, last: StageConfig, steps: tuple[int, ...] = (7,)) -> Path:
    """A run folder of two stages whose checkpoints, all the same, are of the second one."""
    first = stage(rope_theta_full=1e4, limits=LimitsConfig())
    recipe: Recipe = tiny_recipe(run / "corpus", run, model=MODEL, stages={"first": first, "last": last})
    (run / "corpus").mkdir(parents=True)
    write_tokenizer(run / "corpus" / "tokenizer.json")
    (run / "recipe.yaml").write_text(to_yaml(recipe))
    for step in steps:
        write_checkpoint(run / "checkpoints", model, step)
    return run


def write_tokenizer(path: Path, eos: str = EOS) -> None:
    """A tokenizer of three words, the last of which ends a document."""
    tokenizer = Tokenizer(WordLevel({"one": 0, "two": 1, eos: 2}, unk_token="one"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([eos])
    tokenizer.save(str(path))


def write_checkpoint(folder: Path, model: Transformer, step: int) -> Path:
    """A checkpoint as training writes it: the model, and something of the optimizer."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors["optimizer.lm_head.weight.exp_avg"] = torch.ones(3)
    counters = Counters(step=step, tokens=64 * step, stage="last").to_dict()
    return save(
        folder,
        step=step,
        pieces=pieces_of(tensors),
        counters=counters,
        recipe_hash="0",
        layout={"world_size": 1},
        keep=Retention(newest=9),
        coordinator=ALONE,
    )


def read_released(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all files by released key."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def change_config(folder: Path, **changes) -> None:
    """Set keys of a config.json; None takes a key out."""
    values = json.loads((folder / "config.json").read_text()) | changes
    values = {key: value for key, value in values.items() if key not in changes or value is not None}
    (folder / "config.json").write_text(json.dumps(values))


def change_tensors(folder: Path, change) -> None:
    tensors = read_released(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same_files(a: Path, b: Path) -> bool:
    names = sorted(path.name for path in a.iterdir())
    return names == sorted(path.name for path in b.iterdir()) and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in names
    )


def fails(capsys, *arguments) -> str:
    """The one line that a command ends with; it must leave nothing behind."""
    out = Path(arguments[-1])
    before = set(out.parent.iterdir())
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert set(out.parent.iterdir()) == before
    return captured.err


def read_with_transformers(folder: Path, **changes) -> Step3p7TextModel:
    """The exported model in transformers; `changes` are made to its config.json, or to tensors by their released
    keys."""
    values = json.loads((folder / "config.json").read_text())
    config = Step3p7TextConfig(**(values | {key: value for key, value in changes.items() if key in values}))
    config._attn_implementation = "eager"
    ignored = [f"model.layers.{config.num_hidden_layers + h}." for h in range(values["num_nextn_predict_layers"])]
    state = {}
    for key, tensor in read_released(folder).items():
        if not key.startswith(("lm_head.", *ignored)):
            name = key
            for pattern, replacement in RENAMES.items():
                name = re.sub(pattern, replacement, name)
            state[name] = changes.get(key, tensor)
    for gate in [name for name in state if name.endswith("experts.gate_proj")]:
        up = state.pop(gate.replace("gate_proj", "up_proj"))
        state[gate.replace("gate_proj", "gate_up_proj")] = torch.cat([state.pop(gate), up], dim=1)
    model = Step3p7TextModel(config)
    model.load_state_dict(state)
    return model.eval()
