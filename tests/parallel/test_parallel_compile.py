"""Compiled block by block: the gradients of the model that is not compiled, and graphs that were really made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from steptron.config.schema import LimitsConfig, RecomputeConfig
from steptron.model.heads import TokenLoss
from steptron.model.init import initialise
from steptron.model.inputs import Inputs, Rows
from steptron.model.transformer import Transformer, apply_stage
from steptron.parallel.compile import apply_compile
from steptron.parallel.recompute import apply_recompute

from tiny import tiny_model, tiny_stage

T = 20
HERE = os.pathsep.join(str(folder) for folder in Path(__file__).parents[1:3])
"""The tests' helpers, and the package beside them."""


LIMITS = (LimitsConfig(), LimitsConfig(routed={1: 0.02, 2: 0.03}, shared={1: 0.02, 2: 0.03}))
"""Of two stages, one after the other: none, then some that act, which the graphs of the first stage do not have."""


def gradients(compiled: bool, parts: tuple = ()) -> list[dict[str, torch.Tensor]]:
    """Return the gradient of each parameter, and the loss as `loss`, for each stage. `parts`: recomputed in layers 0 and 2; the
    shared expert of layer 2 is then not compiled."""
    model = Transformer(tiny_model(num_layers=3, num_mtp_heads=0))
    initialise(model, 3, 0.1)
    apply_recompute(model, RecomputeConfig(parts=parts, every=2))
    if compiled:
        apply_compile(model)
    tokens = torch.randint(50, (2, T + 1), generator=torch.Generator().manual_seed(5))
    found = []
    for limits in LIMITS:
        apply_stage(model, tiny_stage(limits=limits, mtp_weight=0.0), num_groups=1)
        model.zero_grad()
        rows = Rows.unweighted(tokens, torch.arange(T + 1).div(9).int().expand(2, -1))
        inputs = Inputs.from_rows(rows, T)
        losses = TokenLoss()(model, model(inputs=inputs), inputs)
        (losses.heads_H[0] + losses.balance).backward()
        found.append({"loss": losses.heads_H[0].detach()} | {name: p.grad for name, p in model.named_parameters()})
    return found


def errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float((found[name] - g).norm() / (g.norm() + 1e-12)) for name, g in expected.items()}


def compare() -> dict:
    """Graphs made; by stage, relative errors of the loss and of every gradient, with recomputation, which goes through
    the compiler too; and how far the gradients of the second stage are from the first one's."""
    expected, found = gradients(compiled=False), gradients(compiled=True, parts=("attention", "ffn"))
    return {
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "errors": [errors(a, b) for a, b in zip(found, expected, strict=True)],
        "difference": max(errors(expected[1], expected[0]).values()),
    }


def test_a_compiled_model_has_the_same_gradients_in_each_stage():
    """In a process of its own: the compiler cannot look through the checks of shapes that the tests put around every
    function."""
    script = [sys.executable, __file__]
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": HERE})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["graphs"] > 4
    assert found["difference"] > 0.1, "the limits are to act"
    for limits, by_name in zip(LIMITS, found["errors"], strict=True):
        worst = max(by_name, key=by_name.get)
        assert by_name["loss"] < 1e-6, f"the loss with {limits} is off by {by_name['loss']:.1e}"
        assert by_name[worst] < 1e-5, f"{worst} with {limits} is off by {by_name[worst]:.1e}"


if __name__ == "__main__":
    print(json.dumps(compare()))
