"""Rows of experts and what they keep, beside counts made by other means."""

from dataclasses import replace

import pytest
import torch
from steptron.config.resolve import resolve
from steptron.config.schema import RecomputeConfig, moe_layers
from steptron.doctor import recipe as checks
from steptron.doctor.activations import expert_activations, expert_rows
from steptron.parallel.mesh import resolve_layout

GIB = 1 << 30


@pytest.fixture(scope="module")
def flash():
    recipe = resolve("step3p5_flash", [], None)
    return recipe, resolve_layout(recipe.parallel, 64)


def test_rows_on_cuda_are_those_of_all_tokens_that_arrive(flash) -> None:
    """Ranks that a token with random choices reaches are counted one by one."""
    recipe, layout = flash
    stage = next(iter(recipe.stages.values()))
    torch.manual_seed(0)
    model, ep = recipe.model.moe, layout.expert["ep"]
    choices_NK = torch.rand(4096, model.num_experts).topk(model.top_k).indices // (model.num_experts // ep)
    reached = sum(len(set(row)) for row in choices_NK.tolist())
    assert expert_rows(recipe, stage, layout, cuda=True) == pytest.approx(reached * model.top_k, rel=0.01)
    assert expert_rows(recipe, stage, layout, cuda=False) == 4096 * model.top_k


def test_the_published_layout_fits_no_device_of_80_gib(flash, monkeypatch) -> None:
    recipe, layout = flash
    most = expert_activations(recipe, layout, cuda=True)
    monkeypatch.setattr(checks, "_room", lambda *_: (80 * GIB, "device", 1))
    finding = checks._activations(recipe, checks.sizes_of(recipe), torch.device("cuda"), [layout])
    assert finding.state == "failed"
    assert f"stage {most.stage}" in finding.found
    assert most.bytes > 80 * GIB
    first = replace(recipe, stages=dict([next(iter(recipe.stages.items()))]))
    model, rows = recipe.model, expert_rows(recipe, next(iter(recipe.stages.values())), layout, cuda=True)
    by_hand = rows * (model.hidden_size + 2 * model.moe.ffn_size) * 2 * (len(moe_layers(model)) // 8) * 8
    assert expert_activations(first, layout, cuda=True).bytes == by_hand


@pytest.mark.parametrize(
    ("parts", "every", "share"), [(("ffn",), 1, 0.0), (("ffn",), 2, 0.5), (("permutation",), 1, None), ((), 1, 1.0)]
)
def test_recomputed_parts_keep_nothing(flash, parts, every, share) -> None:
    recipe, layout = flash
    whole = expert_activations(recipe, layout, cuda=True).bytes
    recompute = RecomputeConfig(parts=parts, every=every)
    changed = replace(recipe, parallel=replace(recipe.parallel, recompute=recompute))
    kept = expert_activations(changed, layout, cuda=True).bytes
    columns = 2 * recipe.model.moe.ffn_size
    share = columns / (columns + recipe.model.hidden_size) if share is None else share
    assert kept == pytest.approx(whole * share)


def test_the_demo_fits(tmp_path) -> None:
    recipe = resolve("demo", [], None)
    layout = resolve_layout(recipe.parallel, 2)
    assert expert_activations(recipe, layout, cuda=False).bytes < GIB
