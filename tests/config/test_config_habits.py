"""Keys that people type from habit: every one is refused with the key that is meant, and that key exists."""

import pytest
from steptron.config.decode import field_types
from steptron.config.habits import HABITS, meant
from steptron.config.resolve import resolve
from steptron.config.schema import Recipe
from steptron.errors import RecipeError

from messages import unknown_keys


def test_every_key_that_is_meant_exists() -> None:
    keys = " ".join(f"{key}=…" for key in HABITS.values())
    assert unknown_keys(keys) == []


@pytest.mark.parametrize("habit", [name for name in HABITS if name not in field_types(Recipe)])
def test_every_habit_at_the_top_and_under_optim_names_a_key(habit: str) -> None:
    assert meant("", habit, field_types(Recipe)) == HABITS[habit]
    assert meant("", f"trainer.{habit}", field_types(Recipe)) == HABITS[habit]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optim.lr=1e-3", "stages.NAME.lr.peak"),
        ("+optim.lr=1e-3", "stages.NAME.lr.peak"),
        ("lr=1e-3", "stages.NAME.lr.peak"),
        ("+lr=1e-3", "stages.NAME.lr.peak"),
        ("learning_rate=1e-3", "stages.NAME.lr.peak"),
        ("optimizer.lr=1e-3", "stages.NAME.lr.peak"),
        ("training.batch_size=8", "stages.NAME.batch_size"),
        ("batch_size=8", "stages.NAME.batch_size"),
        ("seq_len=8", "stages.NAME.seq_len"),
        ("stages.base.learning_rate=1", "stages.base.lr.peak"),
        ("stages.base.warmup_steps=1", "stages.base.lr.warmup"),
        ("stages.base.global_batch_size=1", "stages.base.batch_size"),
        ("model.hidden=8", "model.hidden_size"),
        ("model.experts=8", "model.moe.num_experts"),
        ("model.sliding.heads=8", "model.sliding.num_heads"),
        ("parallel.tp=2", "parallel.dense.tp"),
        ("parallel.ep=2", "parallel.expert.ep"),
        ("name=x", "run.name"),
        ("dtype=bf16", "precision"),
    ],
)
def test_an_override_from_habit_is_refused_with_the_key_that_is_meant(override: str, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve("demo", [override])
    message = str(caught.value)
    assert message.endswith(f"; meant: {key}")
    assert "\n" not in message


def test_a_misspelt_key_still_gets_the_nearest_one() -> None:
    with pytest.raises(RecipeError, match=r"nearest: weight_decay$"):
        resolve("demo", ["optim.weight_decy=1"])
