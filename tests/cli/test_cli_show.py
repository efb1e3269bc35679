"""`steptron show`: the printed recipe, and its figures beside counts made by other means."""

import re
from pathlib import Path

import pytest
import torch
from steptron.cli.main import main
from steptron.config.resolve import resolve
from steptron.config.schema import moe_layers
from steptron.doctor.memory import dearest, rank_memories
from steptron.doctor.recipe import sizes_of
from steptron.model.flops import num_active_parameters, num_parameters
from steptron.model.transformer import Transformer
from steptron.parallel.rules import layouts_of

from tiny import tiny_model

SMALL = str(Path(__file__).parents[1] / "config" / "small.yaml")


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["show", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_the_output_is_a_recipe_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "again.yaml").write_text(shown(capsys, SMALL, "seed=5"))
    assert resolve(str(tmp_path / "again.yaml")) == resolve(SMALL, ["seed=5"])


def test_the_published_model_is_shown_without_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in shown(capsys, "step3p5_flash", "--ranks", "512").splitlines() if line.startswith("#")]
    text = "\n".join(lines)
    parameters, active = (int(n.replace(",", "")) for n in re.findall(r"([\d,]{9,}) (?:parameters|active)", text))
    assert 196e9 < parameters < 206e9, "196B are published, without MTP heads"
    assert 11e9 < active < 16e9, "11B are published, without MTP heads and output matrices"
    assert text.count("# layout: 512 ranks") == 3, "of 4,096, 32,768 and 131,072 tokens"
    assert "stage mid-2, pipeline rank 2: " in text
    assert "# pipeline rank 1 has most work, 1.04 × the mean" in text
    stages = resolve("step3p5_flash").stages
    total = next(line for line in lines if line.startswith("# total"))
    assert f"{sum(stage.tokens for stage in stages.values()):,}" in total


def test_a_layout_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", SMALL, "parallel.dense.tp=2", "--ranks", "3"]) == 2
    assert "needs a multiple of 2 ranks, there are 3" in capsys.readouterr().err
    assert main(["show"]) == 2
    assert capsys.readouterr().err.startswith("error: show needs a recipe")


def test_the_ranks_of_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    own = "stages.longer.parallel={ranks: 4, dense: {cp: 2}}"
    for options, first in (((), "1 rank"), (("--ranks", "2"), "2 ranks")):
        lines = [line for line in shown(capsys, SMALL, own, *options).splitlines() if line.startswith("# ")]
        parts = [line for line in lines if line.startswith(("# stage base:", "# stage longer:", "# layout"))]
        assert parts == ["# stage base:", f"# layout: {first}", "# stage longer:", "# layout: 4 ranks"]
    assert main(["show", SMALL, "stages.longer.parallel={ranks: 3, dense: {cp: 2}}"]) == 2
    error = capsys.readouterr().err
    assert "stages.longer, which has its own layout: " in error
    assert "needs a multiple of 2 ranks, there are 3" in error


def test_keys_with_and_without_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    every = shown(capsys, "--keys")
    assert "\nstages.NAME.lr.peak\n    number, at least 0; required\n    The learning rate after warm-up.\n" in every
    of_one = shown(capsys, SMALL, "--keys", "stages.base.lr.peak=0.002")
    assert "\nstages.base.lr.peak = 0.002\nstages.longer.lr.peak = 0.0005\n    number, at least 0; required\n" in of_one
    assert "\nstages.base.ramp.0.until = " in of_one
    assert "NAME" not in "".join(line for line in of_one.splitlines() if " = " in line)


def test_active_parameters_are_those_that_a_token_reaches() -> None:
    config = tiny_model()
    with torch.device("meta"):
        model = Transformer(config)
    reached = 0
    for name, parameter in model.named_parameters():
        of_expert = ".experts." in name
        reached += parameter.numel() // config.moe.num_experts * config.moe.top_k if of_expert else parameter.numel()
    assert num_active_parameters(config) == reached
    assert len(moe_layers(config)) > 1


@pytest.mark.parametrize("overrides", [[], ["optim.matrix_optimizer=adamw"]], ids=["muon", "adamw"])
def test_the_memory_of_one_rank_is_that_of_the_network(overrides: list[str]) -> None:
    recipe = resolve(SMALL, overrides)
    held, sizes = dearest(recipe, layouts_of(recipe, 1)[0], cuda=False).memory, sizes_of(recipe)
    assert (held.weights, held.optimizer) == (sizes.weights, sizes.optimizer)
    assert held.gradients == 4 * num_parameters(recipe.model)


@pytest.mark.parametrize(
    ("layout", "ranks", "shares"),
    [
        ("parallel.dense.dp_replicate=2 parallel.expert.dp_replicate=2", 4, 2),
        ("parallel.dense.tp=2 parallel.expert.ep=2 parallel.expert.etp=2", 4, 4),
    ],
)
def test_ranks_share_everything_but_replicas_and_biases(layout: str, ranks: int, shares: int) -> None:
    recipe = resolve(SMALL, ["stages.base.micro_batch=8", "stages.longer.batch_size=4", *layout.split()])
    held, alone = (
        dearest(recipe, layouts_of(recipe, ranks)[0], cuda=False).memory,
        dearest(recipe, layouts_of(resolve(SMALL), 1)[0], cuda=False).memory,
    )
    assert held.optimizer == pytest.approx(alone.optimizer / shares, rel=1e-3)
    assert held.gradients == pytest.approx(alone.gradients / shares, rel=1e-3)


def test_a_pipeline_rank_has_its_own_layers() -> None:
    recipe, whole = resolve(SMALL, ["parallel.pp=2"]), resolve(SMALL)
    held, alone = (
        max(rank_memories(one, one.stages["base"], layouts_of(one, ranks)[0], cuda=False), key=lambda m: m.weights)
        for one, ranks in ((recipe, 2), (whole, 1))
    )
    assert alone.weights / 2 <= held.weights < alone.weights
