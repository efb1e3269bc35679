"""A run may get new stages and sources: the global stream is that of a run that had them from the start, and whatever
would change what was drawn before is refused."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steptron.config.schema import DataConfig, LrConfig, SourceConfig, StageConfig
from steptron.data.curriculum import coming_steps
from steptron.data.drawn import move_limits, refuse_other_data
from steptron.data.loader import Loader
from steptron.errors import DataError
from steptron.train.batch import row_ranges
from steptron.train.counters import Counters

CODE = [[[*range(1, 60), 0] for _ in range(20)]]
PROSE = [[[*range(1, 1 + length), 0] for length in range(1, 40)]]
ROWS = 12
"""The rows of a step, over all ranks: 1 to 4 ranks take them in micro-batches of 1 or 3."""


def stage(seq_len: int, steps: int = 3, **mix: float) -> StageConfig:
    return StageConfig(tokens=steps * ROWS * seq_len, seq_len=seq_len, batch_size=ROWS, mix=mix, lr=LrConfig(peak=1e-3))


STAGES = {"base": stage(16, code=0.7, prose=0.3), "long": stage(32, code=1, prose=1)}
LATER = {"extra": stage(16, steps=2, math=2, code=1), "last": stage(8, steps=2, math=1)}


@pytest.fixture
def data(write_source, tokenizer_file: Path) -> DataConfig:
    marks = {"prose": lambda ids: (1, np.zeros(len(ids), dtype=bool))}
    folders = {
        name: write_source(name, CODE if name == "code" else PROSE, mark=marks.get(name))
        for name in ("code", "prose", "math")
    }
    sources = {name: SourceConfig(path=str(folder)) for name, folder in folders.items()}
    return DataConfig(sources=sources, tokenizer=str(tokenizer_file))


def open_loader(data: DataConfig, stages: Mapping[str, StageConfig] = STAGES, seed: int = 1) -> Loader:
    return Loader(data, stages, seed, num_mtp_heads=2, vocab_size=100)


@dataclass(frozen=True)
class At:
    """A place in the curriculum, as a checkpoint keeps it."""

    step: int = 0
    stage: str = ""
    stage_tokens: int = 0
    stage_samples: int = 0


@dataclass(frozen=True)
class Part:
    """The part of a run between two starts."""

    stages: Mapping[str, StageConfig]
    ranks: int
    micro_batch: int
    steps: int


Step = list[tuple[int, str, bytes]]
"""The rows of a step in order: index, source, tokens."""


def stream(data: DataConfig, parts: list[Part]) -> list[Step]:
    """Return all rows of a run by step. Each part begins as a resume does: from the saved place and saved facts."""
    at, drawn, rows = At(), {}, []
    for part in parts:
        loader = open_loader(data, part.stages)
        refuse_other_data(drawn, list(part.stages), loader.facts)
        for plan, _ in zip(coming_steps(part.stages, at, []), range(part.steps), strict=False):
            config = part.stages[plan.stage]
            done = at.stage_tokens if plan.stage == at.stage else 0
            step: Step = []
            for rank in range(part.ranks):
                for indices in row_ranges(plan.samples.start, ROWS, part.micro_batch, rank, part.ranks):
                    batch = loader.batch(plan.stage, indices)
                    tokens = [row.numpy().tobytes() for row in batch.rows.tokens_BS]
                    step += zip(indices, batch.sources, tokens, strict=True)
            rows.append(sorted(step))
            at = At(plan.step, plan.stage, done + ROWS * config.seq_len, plan.samples.stop)
            names = list(part.stages)
            drawn = json.loads(json.dumps(loader.facts(names[: names.index(plan.stage) + 1])))
    return rows


@given(
    ranks=st.tuples(*[st.sampled_from([1, 2, 4])] * 2),
    micro_batches=st.tuples(*[st.sampled_from([1, 3])] * 2),
    stop=st.integers(1, 6),
    known=st.sampled_from([["base"], ["base", "long"]]),
    added=st.sampled_from([["long"], ["long", "extra"], ["long", "extra", "last"]]),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_stream_of_a_run_that_grows_is_that_of_one_that_had_it_all(
    data: DataConfig,
    ranks: tuple[int, int],
    micro_batches: tuple[int, int],
    stop: int,
    known: list[str],
    added: list[str],
) -> None:
    whole = STAGES | LATER
    first = {name: whole[name] for name in known}
    then = {name: whole[name] for name in dict.fromkeys([*known, *added])}
    grown = stream(data, [Part(first, ranks[0], micro_batches[0], stop), Part(then, ranks[1], micro_batches[1], 99)])
    assert grown == stream(data, [Part(then, 1, ROWS, 99)])


ACCEPTED = {
    "nothing changed": lambda data, stages: (data, stages),
    "a new stage": lambda data, stages: (data, stages | LATER),
    "another mix of a later stage": lambda data, stages: (data, stages | {"long": stage(32, math=1)}),
    "another length of a later stage": lambda data, stages: (data, stages | {"long": stage(64, code=1)}),
    "a later stage left out": lambda data, stages: (data, {"base": stages["base"]}),
    "a stage before a later one": lambda data, stages: (data, {"base": stages["base"], **LATER, **stages}),
    "other content of a source of later stages": lambda data, stages: (
        other_content(data, "math"),
        stages | {"long": stage(32, math=1)},
    ),
}
REFUSED = {
    "a stage that has begun left out": (
        lambda data, stages: (data, {"long": stages["long"]}),
        "stages=long must begin with base, which the run has begun: keep their names and their order",
    ),
    "a stage renamed": (
        lambda data, stages: (data, {"basis": stages["base"], "long": stages["long"]}),
        "stages=basis, long must begin with base, which",
    ),
    "another order": (
        lambda data, stages: (data, {"long": stages["long"], "base": stages["base"]}),
        "stages=long, base must begin with base, which",
    ),
    "a stage before the present one": (
        lambda data, stages: (data, {"extra": stage(16, code=1), **stages}),
        "stages=extra, base, long must begin with base, which",
    ),
    "another length": (
        lambda data, stages: (data, stages | {"base": stage(8, code=0.7, prose=0.3)}),
        "stages.base.seq_len=8 cannot change, because the run has begun stage base with 16",
    ),
    "another weight": (
        lambda data, stages: (data, stages | {"base": stage(16, code=0.7, prose=0.4)}),
        "stages.base.mix.prose=0.4 cannot change, because the run has begun stage base with 0.3",
    ),
    "a new source in a stage that has begun": (
        lambda data, stages: (data, stages | {"base": stage(16, code=0.7, prose=0.3, math=1)}),
        "stages.base.mix.math=1.0 cannot change, because the run has begun stage base with null",
    ),
    "other content": (
        lambda data, stages: (other_content(data, "code"), stages),
        "data.sources.code does not hold the tokens that the run has drawn from: put them back, or give the new ones",
    ),
}
Change = Callable[[DataConfig, dict[str, StageConfig]], tuple[DataConfig, dict[str, StageConfig]]]


def other_content(data: DataConfig, name: str) -> DataConfig:
    """Return the data with the shards of another source under this name."""
    other = data.sources["prose" if name != "prose" else "code"]
    return replace(data, sources={**data.sources, name: other})


def resumed(data: DataConfig, change: Change, seed: int = 1) -> None:
    """Do what a resume does with a checkpoint of stage base."""
    drawn: Any = json.loads(json.dumps(open_loader(data).facts(["base"])))
    data, stages = change(data, dict(STAGES))
    refuse_other_data(drawn, list(stages), open_loader(data, stages, seed).facts)


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_has_not_begun_may_change(data: DataConfig, name: str) -> None:
    resumed(data, ACCEPTED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_drawn_may_not_change(data: DataConfig, name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(DataError) as caught:
        resumed(data, change)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith("a fork may change the mix of its present stage") == (".mix." in message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("was", "now", "accepted"),
    [
        (None, 10**6, True),
        (None, 36 * 16 + 12 * 32 + 32, True),
        (None, 36 * 16 + 12 * 32, True),
        (None, 36 * 16 + 12 * 32 - 32, False),
        (None, 0, False),
        (36 * 16 + 99 * 32, None, True),
        (36 * 16 + 99 * 32, 36 * 16 + 12 * 32, True),
        (36 * 16, 36 * 16 + 1, False),
        (36 * 16, 36 * 16, True),
        (36 * 16, 35 * 16, False),
        (0, 10**6, False),
    ],
    ids=str,
)
def test_the_end_of_training_metadata_may_move_where_the_run_has_not_been(
    data: DataConfig, was: int | None, now: int | None, accepted: bool
) -> None:
    """The run has read all of `base` (36 samples of 16 tokens) and 12 samples of `long` (32 tokens)."""
    before, after = (open_loader(replace(data, metadata_until=until)) for until in (was, now))
    begun = before.facts(["base", "long"])
    sources = {"base": {"code": {"tokens": 36 * 16}}, "long": {"prose": {"tokens": 12 * 32}}}
    counters = Counters(stage="long", stage_samples=12, sources=sources, drawn=json.loads(json.dumps(begun)))
    moved = move_limits(counters.drawn, counters.samples_by_stage, after.facts(["base", "long"]))
    if accepted:
        refuse_other_data(moved, list(STAGES), after.facts)
        assert moved == after.facts(["base", "long"]), "the next resume compares with the limit of this one"
    else:
        with pytest.raises(
            DataError, match=r"^data\.metadata_until: stage (base|long) has begun and trains metadata in"
        ):
            refuse_other_data(moved, list(STAGES), after.facts)


def test_a_checkpoint_without_a_limit_for_metadata_is_one_of_all_samples(data: DataConfig) -> None:
    drawn = open_loader(data).facts(["base"])
    del drawn["stages"]["base"]["metadata_until"]  # as an older version saved it
    refuse_other_data(drawn, list(STAGES), open_loader(data).facts)
    later = open_loader(replace(data, metadata_until=10 * 16))
    refuse_other_data(move_limits(drawn, {"base": 9}, later.facts(["base"])), list(STAGES), later.facts)


def test_another_seed_or_tokenizer_is_named(data: DataConfig, write_source, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"another seed \(1\) than the recipe's \(2\)"):
        resumed(data, ACCEPTED["nothing changed"], seed=2)
    drawn = open_loader(data).facts(["base"]) | {"tokenizer": "0" * 32}
    with pytest.raises(DataError, match=r"another tokenizer \(0{32}\) than the recipe's \(\w{32}\): put it back"):
        refuse_other_data(drawn, list(STAGES), open_loader(data).facts)


def test_a_run_without_a_step_may_change_everything(data: DataConfig) -> None:
    refuse_other_data({}, ["last"], open_loader(data, LATER).facts)
