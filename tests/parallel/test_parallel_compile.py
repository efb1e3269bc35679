"""Compiled block by block: the gradients of the model that is not compiled, and graphs that were really made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from sizes import tiny_model, tiny_stage

from steptron.config.schema import RecomputeConfig
from steptron.model.init import initialise
from steptron.model.inputs import Inputs
from steptron.model.transformer import Transformer, apply_stage
from steptron.parallel.compile import apply_compile
from steptron.parallel.recompute import apply_recompute

T = 20
TESTS = str(Path(__file__).parents[1])


def gradients(compiled: bool, parts: tuple = ()):
    model = Transformer(tiny_model(num_layers=2, num_mtp_heads=0))
    initialise(model, 3, 0.1)
    apply_stage(model, tiny_stage(limits=tiny_stage().limits.__class__(), mtp_weight=0.0), num_groups=1)
    apply_recompute(model, RecomputeConfig(parts=parts))
    if compiled:
        apply_compile(model)
    tokens = torch.randint(50, (2, T + 1), generator=torch.Generator().manual_seed(5))
    losses = model(inputs=Inputs.from_rows(tokens, torch.arange(T + 1).div(9).int().expand(2, -1), T))
    (losses.lm + losses.balance).backward()
    return losses.lm.detach(), {name: p.grad for name, p in model.named_parameters()}


def compare() -> dict:
    """Graphs made, and relative errors of the loss and of every gradient; with recomputation, which goes through the compiler too."""
    loss, expected = gradients(compiled=False)
    found_loss, found = gradients(compiled=True, parts=("attention", "ffn"))
    errors = {n: float((found[n] - g).norm() / (g.norm() + 1e-12)) for n, g in expected.items()}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"graphs": graphs, "loss": float((found_loss - loss).abs() / loss), "gradients": errors}


def test_a_compiled_model_has_the_same_gradients():
    """In a process of its own: the compiler cannot look through the checks of shapes that the tests put around every function."""
    script = [sys.executable, __file__]
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": TESTS})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["graphs"] > 4
    assert found["loss"] < 1e-6
    worst = max(found["gradients"], key=found["gradients"].get)
    assert found["gradients"][worst] < 1e-5, worst


if __name__ == "__main__":
    print(json.dumps(compare()))
