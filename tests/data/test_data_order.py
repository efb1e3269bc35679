"""The global stream of samples does not depend on how it is read: ranks, micro-batches, reading ahead, stops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steptron.config.schema import DataConfig, RampStep, SourceConfig, StageConfig
from steptron.data.curriculum import Window, coming_steps
from steptron.data.loader import Loader, Prefetcher
from steptron.train.batch import row_ranges
from steptron.train.counters import Counters

from tiny import tiny_stage

VOCAB = 4000
STAGES = {
    "base": tiny_stage(
        seq_len=16,
        batch_size=8,
        tokens=12 * 8 * 16,
        mix={"a": 0.5, "b": 0.3, "c": 0.2},
        ramp=(RampStep(until=4 * 4 * 16, batch_size=4),),
    ),
    "packed": tiny_stage(seq_len=32, batch_size=4, tokens=6 * 4 * 32, mix={"a": 0.6, "b": 0.4}, packing="best_fit"),
    "long": tiny_stage(seq_len=64, batch_size=4, tokens=5 * 4 * 64, mix={"c": 0.7, "b": 0.3}, min_length={"c": 20}),
}
ADDED = tiny_stage(seq_len=24, batch_size=4, tokens=3 * 4 * 24, mix={"d": 1.0, "a": 1.0})


@pytest.fixture
def data(write_source, tokenizer_file: Path) -> DataConfig:
    """Four sources in which a token is its place in the source: with the source it stands for document and offset."""
    rng, sources = np.random.default_rng(0), {}
    for name in "abcd":
        ends = np.cumsum([0, *rng.integers(1, 40, 90), 70]).tolist()
        shards = [[range(start, end) for start, end in pairwise(ends)]]
        sources[name] = SourceConfig(path=str(write_source(name, shards, VOCAB)))
    return DataConfig(sources=sources, tokenizer=str(tokenizer_file))


@dataclass(frozen=True)
class Part:
    """A process or more that read a part of a run."""

    ranks: int
    micro_batch: int
    ahead: int
    """Batches that are read ahead of time."""
    last_step: int = 10**9


Stream = dict[int, list[tuple[str, str, bytes, bytes, bytes]]]
"""By step: stage, source, tokens, documents and weights of each row, in the order of the global batch."""


def stream(
    data: DataConfig, stages: dict[str, StageConfig], windows: Sequence[Window], *parts: Part, seed: int = 3
) -> Stream:
    """Read a run, part after part, each with a loader of its own."""
    read: Stream = {}
    counters = Counters()
    for part in parts:
        chosen = {name: replace(stage, micro_batch=part.micro_batch) for name, stage in stages.items()}
        plans = [p for p in coming_steps(chosen, counters, windows) if p.step <= part.last_step]
        rows: dict[int, dict[int, tuple]] = {plan.step: {} for plan in plans}
        loader = Loader(data, chosen, seed=seed, num_mtp_heads=1, vocab_size=VOCAB)
        for rank in range(part.ranks):
            requests = [
                (plan, indices)
                for plan in plans
                for indices in row_ranges(plan.samples.start, len(plan.samples), part.micro_batch, rank, part.ranks)
            ]
            with Prefetcher(loader, ((p.stage, indices) for p, indices in requests), depth=part.ahead) as batches:
                for (plan, indices), batch in zip(requests, batches, strict=True):
                    values = (batch.rows.tokens_BS, batch.rows.documents_BS, batch.rows.weights_BS)
                    for place, (index, source) in enumerate(zip(indices, batch.sources, strict=True)):
                        row = (value[place].numpy().tobytes() for value in values)
                        rows[plan.step][index] = (plan.stage, source, *row)
        for plan in plans:
            assert sorted(rows[plan.step]) == list(plan.samples), "every row once"
            read[plan.step] = [rows[plan.step][index] for index in plan.samples]
            stage = counters if plan.stage == counters.stage else counters.enter_stage(plan.stage, {})
            tokens = {plan.stage: len(plan.samples)}
            counters = stage.after_step(plan.samples, chosen[plan.stage].seq_len, tokens, tokens, tokens)
    return read


@pytest.fixture
def undisturbed(data: DataConfig) -> Callable[[bool, Sequence[Window]], Stream]:
    """The batches that one process reads, with or without the new stage and some windows."""
    return cache(
        lambda added, windows: stream(data, STAGES | ({"added": ADDED} if added else {}), windows, Part(1, 1, 1))
    )


READERS = st.tuples(st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]), st.integers(1, 3))
"""((ranks, rows of a micro-batch), batches read ahead)."""


SKIPPED = (
    (),
    (Window("base", 6, 13),),
    (Window("packed", 0, 4), Window("long", 9, 10)),
    (Window("base", 0, 1), Window("base", 40, 49), Window("long", 1, 3)),
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=READERS, after=READERS, stop=st.integers(1, 26), added=st.booleans(), skipped=st.sampled_from(SKIPPED))
def test_the_stream_is_that_of_one_undisturbed_process(data, undisturbed, before, after, stop, added, skipped) -> None:
    stages = STAGES | ({"added": ADDED} if added else {})
    first = Part(*before[0], ahead=before[1], last_step=stop)
    assert stream(data, stages, skipped, first, Part(*after[0], ahead=after[1])) == undisturbed(added, skipped)


def test_a_new_stage_changes_nothing_before_it_and_another_seed_changes_all(data, undisturbed) -> None:
    known, grown = undisturbed(False, ()), undisturbed(True, ())
    assert {step: grown[step] for step in known} == known
    assert len(grown) == len(known) + 3
    other = stream(data, STAGES, (), Part(1, 1, 1), seed=4)
    assert all(other[step] != known[step] for step in known)
