"""What resume lets through, and what would make another run of it."""

from dataclasses import replace
from pathlib import Path

import pytest
from steptron.config.changes import changes, recipe_hash
from steptron.config.resolve import load_recipe, resolve, to_yaml
from steptron.errors import RecipeError

SMALL = str(Path(__file__).parent / "small.yaml")


def test_nothing_changed() -> None:
    assert changes(resolve(SMALL), resolve(SMALL)) == {}


def test_layout_budget_and_schedule_may_change() -> None:
    new = resolve(
        SMALL,
        [
            "stages.longer.tokens=1M",
            "stages.longer.lr.peak=1e-4",
            "parallel.dense.dp_shard=2",
            "checkpoint.every=7",
            "+stages.extra={tokens: 4K, seq_len: 64, batch_size: 2, mix: {code: 1}, lr: {peak: 1e-4}}",
        ],
    )
    found = changes(resolve(SMALL), new)
    assert found["stages.longer.tokens"] == [resolve(SMALL).stages["longer"].tokens, 1_000_000]
    assert found["parallel.dense.dp_shard"] == [-1, 2]
    assert found["checkpoint.every"][1] == 7
    assert found["stages.extra.seq_len"] == [None, 64]


def test_what_the_checkpoint_decides_is_let_through_here() -> None:
    """The command does not know yet which stages have begun: data/drawn.py compares them with the checkpoint."""
    found = changes(resolve(SMALL), resolve(SMALL, ["stages.longer.seq_len=512", "stages.longer.mix={prose: 1}"]))
    assert found == {
        "stages.longer.seq_len": [4096, 512],
        "stages.longer.mix.code": [1.0, None],
        "stages.longer.mix.prose": [None, 1.0],
    }
    assert changes(resolve(SMALL), resolve(SMALL, ["~stages.longer"]))["stages.longer.tokens"] == [150_000, None]


def test_where_a_run_is_does_not_count_and_a_copy_may_have_a_name_of_its_own() -> None:
    assert changes(resolve(SMALL), resolve(SMALL, ["run.dir=elsewhere"])) == {}
    renamed = resolve(SMALL, ["run.name=other"])
    assert changes(resolve(SMALL), renamed, renamed=True) == {"run.name": [resolve(SMALL).run.name, "other"]}
    with pytest.raises(RecipeError, match="seed=1 cannot change"):
        changes(resolve(SMALL), resolve(SMALL, ["run.name=other", "seed=1"]), renamed=True)


def test_the_default_chunk_of_the_loss_may_become_the_old_one_and_back() -> None:
    new, old = resolve(SMALL), resolve(SMALL, ["model.loss_chunk=256"])
    other = resolve(SMALL, ["model.loss_chunk=128"])
    assert new.model.loss_chunk == "auto"
    assert changes(old, new) == {"model.loss_chunk": [256, "auto"]}
    assert changes(new, old) == {"model.loss_chunk": ["auto", 256]}
    assert recipe_hash(new) == recipe_hash(old) != recipe_hash(other)
    with pytest.raises(RecipeError, match=r"^model\.loss_chunk=128 cannot change in a run, which has auto"):
        changes(new, other)


def test_a_run_with_a_chunk_above_its_tokens_can_be_continued(tmp_path: Path) -> None:
    """It was allowed once. New runs are refused, but a kept recipe still loads."""
    kept = resolve(SMALL)
    (tmp_path / "recipe.yaml").write_text(to_yaml(replace(kept, model=replace(kept.model, loss_chunk=90_000))))
    assert load_recipe(tmp_path / "recipe.yaml").model.loss_chunk == 90_000
    with pytest.raises(RecipeError, match=r"^model\.loss_chunk=90000 is more than the "):
        resolve(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param("model.norm_eps=1e-6", "model.norm_eps=1e-06 cannot change in a run, which has 1e-05", id="model"),
        pytest.param("seed=1", "seed=1 cannot change", id="seed"),
        pytest.param("run.name=x", "run.name=x cannot change", id="name"),
        pytest.param("optim.matrix_optimizer=adamw", "optim.matrix_optimizer=adamw cannot change", id="optimizer"),
    ],
)
def test_what_a_run_keeps(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        changes(resolve(SMALL), resolve(SMALL, [override]))
    assert message in str(caught.value)
