"""The memory of a rank: the published model fits 80 GB, and what does not fit gets the cheapest change that helps."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from steptron.config.layouts import by_layout
from steptron.config.resolve import resolve
from steptron.config.schema import Recipe
from steptron.doctor import recipe as checks
from steptron.doctor.memory import dearest, rank_memories, refuse_what_cannot_fit, what_fits
from steptron.errors import RecipeError
from steptron.parallel.mesh import resolve_layout
from steptron.parallel.pipeline_split import cut
from steptron.parallel.rules import layouts_of

GIB = 1 << 30
H800, MARGIN = 80e9, 6e9
RANKS = 4096


def test_each_stage_of_the_published_model_fits_a_device_of_80_gb_with_room_to_spare() -> None:
    recipe = resolve("step3p5_flash", [], None)
    for part, layout in zip(by_layout(recipe), layouts_of(recipe, RANKS), strict=True):
        for stage in part.stages.values():
            for memory in rank_memories(part, stage, layout, cuda=True):
                assert sum(memory) <= H800 - MARGIN


@pytest.mark.parametrize("stage", ["pre-1", "mid-2"])
def test_what_makes_it_fit_is_told_and_does(stage: str) -> None:
    """The recipe recomputes nothing here, and each rank has whole rows of any length."""
    recipe = resolve("step3p5_flash", ["parallel.recompute.parts=[]"], None)
    recipe = replace(recipe, stages={stage: replace(recipe.stages[stage], parallel=None)})
    layout = resolve_layout(recipe.parallel, RANKS)
    room = H800 - MARGIN
    assert sum(dearest(recipe, layout, cuda=True).memory) > room
    said = what_fits(recipe, layout, cuda=True, room=room, key="parallel")
    assert said.startswith("set parallel.")
    overrides = said.removeprefix("set ").partition(", with")[0].split()
    changed = resolve("step3p5_flash", ["parallel.recompute.parts=[]", *overrides], None)
    changed = replace(changed, stages={stage: replace(changed.stages[stage], parallel=None)})
    assert sum(dearest(changed, resolve_layout(changed.parallel, RANKS), cuda=True).memory) <= room


def test_nothing_helps_a_device_that_is_too_small() -> None:
    recipe = resolve("step3p5_flash", [], None)
    recipe = replace(recipe, stages=dict([next(iter(recipe.stages.items()))]))
    layout = resolve_layout(recipe.parallel, RANKS)
    for room in (10 * GIB, 23 * GIB):  # less than what is gathered, and hardly more
        assert what_fits(recipe, layout, cuda=True, room=room, key="parallel") == ""


def finding(recipe: Recipe, room: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "_room", lambda *_: (room, "device", 1))
    return checks._memory(recipe, torch.device("cuda"), layouts_of(recipe, RANKS))


def test_the_doctor_refuses_what_cannot_fit_and_says_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve("step3p5_flash", [], None)
    assert finding(recipe, H800, monkeypatch).state == "ok"
    refused = finding(recipe, 60e9, monkeypatch)
    assert refused.state == "failed"
    assert refused.found.startswith("stage mid-2, pipeline rank 2: weights 0.3 + gradients 0.3 + optimizer 0.3 + ")
    assert refused.fix == "set stages.mid-2.parallel.recompute.parts=[ffn,norm], with which it takes 50.3 GiB"


def test_a_layout_of_a_stage_is_changed_by_its_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve("step3p5_flash", [], None)
    recipe = replace(recipe, stages={name: recipe.stages[name] for name in ("pre-1", "mid-2")})
    long = replace(recipe.stages["mid-2"], micro_batch=2)
    recipe = replace(recipe, stages=recipe.stages | {"mid-2": long})
    refused = finding(recipe, H800, monkeypatch)
    assert refused.found.startswith("stage mid-2, pipeline rank 2: ")
    assert refused.fix.startswith("set stages.mid-2.parallel.recompute.parts=[")


def test_a_run_that_cannot_fit_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve("step3p5_flash", [], None)
    parts = zip(by_layout(recipe), layouts_of(recipe, RANKS), strict=True)
    layouts = {name: layout for part, layout in parts for name in part.stages}
    device = torch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=H800))
    refuse_what_cannot_fit(recipe, layouts, device)
    refuse_what_cannot_fit(recipe, layouts, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=60e9))
    with pytest.raises(RecipeError) as caught:
        refuse_what_cannot_fit(recipe, layouts, device)
    assert re.fullmatch(
        r"stage pre-1, pipeline rank 1: weights 0\.2 \+ .* = 61\.1 GiB, more than the 55\.9 GiB of cuda:3; "
        r"set parallel\.recompute\.parts=\[norm,silu,permutation\], with which it takes 55\.4 GiB",
        str(caught.value),
    )


def test_a_pipeline_rank_gathers_its_stage_and_adds_its_gradients_up_in_fp32() -> None:
    recipe = resolve("step3p5_flash", [], None)
    all_heads = {name: replace(stage, mtp_heads=None) for name, stage in recipe.stages.items()}
    recipe = replace(recipe, stages=all_heads)
    [layout, *_] = layouts_of(recipe, RANKS)
    stage = recipe.stages["pre-1"]
    memory, last, model = rank_memories(recipe, stage, layout, cuda=True)[7], cut(recipe, 8)[7], recipe.model
    assert (last.blocks, last.outputs, last.ffns) == ((3,), (1, 2, 3), ()), "the block reads a copy of the embedding"
    least = 4 * model.vocab_size * model.hidden_size * (2 + 4)
    assert least <= memory.gathered <= 1.2 * least, "three output matrices, the embedding and a block"
    one = replace(stage, ramp=(), batch_size=512)
    assert rank_memories(recipe, one, layout, cuda=True)[7].gathered == pytest.approx(memory.gathered * 4 / 6), (
        "a single micro-batch has no sums"
    )
