"""The published 196B configuration, on the meta device: exact size, and in little memory."""

import json
import subprocess
import sys

from steptron.config.resolve import resolve
from steptron.model.flops import flops_per_token, num_parameters

SCRIPT = """
import json
import torch
from steptron.config.resolve import resolve
from steptron.model.hf_map import tensor_table
from steptron.model.transformer import Transformer
from steptron.train.device import peak_memory

recipe = resolve("step3p5_flash")
with torch.device("meta"):
    model = Transformer(recipe.model)
state = {name: tuple(t.shape) for name, t in model.state_dict().items()}
print(json.dumps({
    "parameters": sum(p.numel() for p in model.parameters()),
    "biases": sum(b.numel() for b in model.buffers()),
    "table": state == {entry.name: tuple(entry.shape) for entry in tensor_table(recipe.model)},
    "bytes": peak_memory(torch.device("cpu")),
}))
"""


def test_flash_has_exactly_the_published_parameters():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["parameters"] == num_parameters(resolve("step3p5_flash").model) == 199_384_289_280
    assert found["biases"] == 12_096
    assert found["table"], "the exported names and shapes are not the network's"
    assert found["bytes"] < 4e9


def test_flops_of_flash_are_six_times_its_active_weights_and_attention():
    config = resolve("step3p5_flash").model
    config = config.__class__(**{**config.__dict__, "num_mtp_heads": 0})
    # 10.93 B active parameters without embeddings; the output matrix is 128,896 × 4,096 more.
    weights = 6 * (10.93e9 + 128_896 * 4096)
    scores = 12 * 128 * (12 * 64 * (4096 + 1) / 2 + 33 * 96 * (512 - 512 * 511 / 8192))
    assert abs(flops_per_token(config, 4096) / (weights + scores) - 1) < 0.01
