"""A stage that trains more MTP heads than the one before: the new ones begin as copies of the first, also at a resume."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from steptron.checkpoint.load import load_part
from steptron.checkpoint.manifest import read_manifest
from steptron.checkpoint.metadata import read_metadata
from steptron.config.schema import CheckpointConfig, LrConfig, Recipe
from steptron.config.validate import validate
from steptron.errors import RecipeError
from steptron.model.flops import flops_per_token
from steptron.train.counters import Counters
from steptron.train.new_heads import new_heads
from torch import Tensor

from small_runs import column, ledger, steptron, write_recipe
from tiny import tiny_recipe

NAMES = ("loss", "mtp_loss", "total_loss", "grad_norm")
HEADS = ("mtp.0.", "mtp.1.")


def growing(corpus: Path, run_dir: Path, *heads: int | None) -> Recipe:
    """Two stages of two steps, of which the second one changes no weight."""
    recipe = tiny_recipe(corpus, run_dir, checkpoint=CheckpointConfig(every=9, keep=9))
    stages = {
        name: replace(stage, mtp_heads=number, tokens=2 * stage.batch_size * stage.seq_len)
        for (name, stage), number in zip(recipe.stages.items(), heads, strict=True)
    }
    stages["long"] = replace(stages["long"], lr=LrConfig(peak=0.0))
    stages["base"] = replace(stages["base"], lr=LrConfig(peak=0.01))
    return replace(recipe, model=replace(recipe.model, num_mtp_heads=2), stages=stages)


def heads_in(checkpoint: Path) -> list[dict[str, Tensor]]:
    """Return weights and optimizer state of both heads, by names without the head's number."""
    stored = read_metadata(checkpoint, read_manifest(checkpoint)).state_dict_metadata
    tensors = {name: torch.empty(entry.size) for name, entry in stored.items() if ".mtp." in name}  # pyright: ignore
    load_part(checkpoint, tensors)
    return [{name.replace(head, ""): t for name, t in tensors.items() if head in name} for head in HEADS]


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    steptron("train", write_recipe(growing(corpus, folder / "run", 1, None), folder / "recipe.yaml"))
    return folder / "run"


def test_a_new_head_is_the_first_one_with_its_optimizer_state(run: Path) -> None:
    first, second = heads_in(run / "checkpoints/step-00000002")
    weights = [name for name in first if name.startswith("model.")]
    assert weights
    assert first.keys() == second.keys()
    untouched = [name for name in first if name.startswith("optimizer.") and not second[name].any()]
    assert untouched == [name for name in first if name.startswith("optimizer.")], "it was not trained"
    assert not any(torch.equal(first[name], second[name]) for name in weights if first[name].ndim == 2)
    border = first
    first, second = heads_in(run / "checkpoints/step-00000004")
    for name in weights:
        assert torch.equal(first[name], border[name]), name
        assert torch.equal(second[name], border[name]), name
    steps = [name for name in first if name.endswith(".step")]
    assert steps
    for name in steps:
        assert first[name] == second[name] == border[name] + 2, "both heads have the steps of the first one"
    [event] = [e for e in ledger(run) if "copied_heads" in e]
    assert (event["event"], event["step"], event["copied_heads"]) == ("stage_start", 2, [2])


def test_a_resume_at_the_border_makes_the_same_copies(run: Path) -> None:
    before = {name: column(run, name) for name in NAMES}
    steptron("resume", run, "--step", "2")
    assert {name: column(run, name) for name in NAMES} == before
    assert len([e for e in ledger(run) if "copied_heads" in e]) == 2


def test_heads_that_are_not_trained_cost_nothing(run: Path, corpus: Path) -> None:
    recipe = growing(corpus, run, 1, None)
    one, both = (flops_per_token(recipe.model, 32, heads) for heads in (1, 2))
    assert both - one > 6 * recipe.model.vocab_size * recipe.model.hidden_size
    line = next(line for line in zip(column(run, "mfu"), column(run, "tokens_per_second"), strict=True))
    assert line[0] == pytest.approx(line[1] * one / 0.1e12)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((3, None), "stages.base.mtp_heads=3 must be at most model.num_mtp_heads=2"),
        (
            (2, 1),
            "stages.long.mtp_heads=1 is less than the 2 of stage base, and the other heads would fall behind the network; "
            "set it to 2 or more",
        ),
        ((0, None), "stages.base.mtp_heads=0 must be at least 1"),
    ],
    ids=["more than there are", "less than before", "none"],
)
def test_numbers_of_heads_that_cannot_be(heads: tuple[int | None, ...], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        validate(growing(Path("corpus"), Path("run"), *heads))
    assert str(caught.value) == message


def test_a_resume_cannot_leave_heads_behind() -> None:
    recipe = growing(Path("corpus"), Path("run"), 1, None)
    assert list(new_heads(recipe, Counters(stage="base"))) == [], "before the first step"
    assert list(new_heads(recipe, Counters(stage="base", mtp_heads=1))) == []
    assert list(new_heads(recipe, Counters(stage="long", mtp_heads=1))) == [2]
    with pytest.raises(RecipeError, match=r"^stages\.base\.mtp_heads=1 is less than the 2 that this run has trained"):
        new_heads(recipe, Counters(stage="base", mtp_heads=2))
