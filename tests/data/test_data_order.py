"""The global stream of samples does not depend on how it is read: ranks, micro-batches, reading ahead, stops. Its
weights are those of a walk over the tokens, one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steptron.config.schema import DataConfig, RampStep, SourceConfig, StageConfig
from steptron.data.curriculum import Window, coming_steps
from steptron.data.loader import Loader, Prefetcher
from steptron.errors import DataError
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
UNTIL = (4 * 4 + 10 * 8) * 16 + 13 * 32 + 5
"""Metadata are trained in the samples that begin before this token of the run: in `base`, and in 14 of `packed`."""
ADDED = tiny_stage(seq_len=24, batch_size=4, tokens=3 * 4 * 24, mix={"d": 1.0, "a": 1.0})


def mark(name: str, ids: Sequence[int]) -> tuple[int, np.ndarray]:
    """Prefix and masked tokens of a document. Source d has none, a no masked ones, b no prefixes."""
    rng, masked = np.random.default_rng(ids[0]), np.zeros(len(ids), dtype=bool)
    prefix = min(len(ids) - 1, int(rng.integers(0, 9))) if name in "ac" else 0
    if name in "bc" and ids[0] % 3:
        masked[prefix:] = rng.random(len(ids) - prefix) < rng.choice([0.2, 0.5, 1.0])
    return prefix, masked


def documents(name: str) -> list[list[range]]:
    """The documents of a source in two shards: a token is its place in the source, counted from 1."""
    ends = np.cumsum([1, *np.random.default_rng(ord(name)).integers(1, 40, 90), 70]).tolist()
    ranges = [range(start, end) for start, end in pairwise(ends)]
    return [ranges[:40], ranges[40:]]


@pytest.fixture
def data(write_source, tokenizer_file: Path) -> DataConfig:
    """Four sources in which a token with its source stands for document and offset."""
    sources = {}
    for name in "abcd":
        folder = write_source(name, documents(name), VOCAB, mark=None if name == "d" else partial(mark, name))
        sources[name] = SourceConfig(path=str(folder))
    return DataConfig(sources=sources, tokenizer=str(tokenizer_file), metadata_until=UNTIL)


@dataclass(frozen=True)
class Part:
    """A process or more that read a part of a run."""

    ranks: int
    micro_batch: int
    ahead: int
    """Batches that are read ahead of time."""
    last_step: int = 10**9


Stream = dict[int, list[tuple[int, str, str, bytes, bytes, bytes]]]
"""The rows of each step, in the order of the global batch: index, stage, source, tokens, documents and weights."""


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
            with Prefetcher(loader.batch, ((p.stage, indices) for p, indices in requests), depth=part.ahead) as batches:
                for (plan, indices), batch in zip(requests, batches, strict=True):
                    values = (batch.rows.tokens_BS, batch.rows.documents_BS, batch.rows.weights_BS)
                    for place, (index, source) in enumerate(zip(indices, batch.sources, strict=True)):
                        row = (value[place].numpy().tobytes() for value in values)
                        rows[plan.step][index] = (index, plan.stage, source, *row)
        for plan in plans:
            assert sorted(rows[plan.step]) == list(plan.samples), "every row once"
            read[plan.step] = [rows[plan.step][index] for index in plan.samples]
            stage = counters if plan.stage == counters.stage else counters.enter_stage(plan.stage, {})
            tokens = {plan.stage: len(plan.samples)}
            counters = stage.after_step(plan.samples, chosen[plan.stage].seq_len, tokens, tokens, tokens)
    return read


@pytest.fixture
def undisturbed(data: DataConfig) -> Callable[..., Stream]:
    """The batches that one process reads, with or without the new stage and some windows."""

    @cache
    def read(added: bool, windows: Sequence[Window], until: int | None = UNTIL) -> Stream:
        stages = STAGES | ({"added": ADDED} if added else {})
        return stream(replace(data, metadata_until=until), stages, windows, Part(1, 1, 1))

    return read


@cache
def weight_of_tokens(name: str, prefix_weight: float) -> dict[int, float]:
    """The weight of each token of a source, by document and token. Padding has none."""
    weights = {0: 0.0}
    for ids in chain.from_iterable(documents(name)):
        prefix, masked = (0, [False] * len(ids)) if name == "d" else mark(name, ids)
        for place, token in enumerate(ids):
            weights[token] = 0.0 if masked[place] else prefix_weight if place < prefix else 1.0
    return weights


def check_weights(found: Stream, until: int | None) -> None:
    """Compare the weights of a stream with those of a walk over its tokens, one by one."""
    begin = tokens = 0
    last = ""
    for rows in found.values():
        for index, stage, source, *arrays in rows:
            begin = begin if stage == last else tokens
            last, length = stage, STAGES.get(stage, ADDED).seq_len
            known = weight_of_tokens(source, float(until is None or begin + index * length < until))
            ids, _, weights = (
                np.frombuffer(one, kind) for one, kind in zip(arrays, (np.int64, np.int32, np.float32), strict=True)
            )
            assert weights.tolist() == [known[token] for token in ids.tolist()]
            tokens += length


READERS = st.tuples(st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]), st.integers(1, 3))
"""((ranks, rows of a micro-batch), batches read ahead)."""


SKIPPED = (
    (),
    (Window("base", 6, 13),),
    (Window("packed", 0, 4), Window("long", 9, 10)),
    (Window("base", 0, 1), Window("base", 40, 49), Window("long", 1, 3)),
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=READERS,
    after=READERS,
    stop=st.integers(1, 26),
    added=st.booleans(),
    skipped=st.sampled_from(SKIPPED),
    until=st.sampled_from([None, 0, UNTIL]),
)
def test_the_stream_is_that_of_one_undisturbed_process(
    data, undisturbed, before, after, stop, added, skipped, until
) -> None:
    stages = STAGES | ({"added": ADDED} if added else {})
    first = Part(*before[0], ahead=before[1], last_step=stop)
    data = replace(data, metadata_until=until)
    found = stream(data, stages, skipped, first, Part(*after[0], ahead=after[1]))
    assert found == undisturbed(added, skipped, until)
    check_weights(found, until)


@pytest.mark.parametrize("until", [0, 1537, UNTIL], ids=str)
def test_metadata_are_trained_up_to_the_sample_that_begins_at_the_limit(data, until: int) -> None:
    """`base` has 96 samples of 16 tokens, and `packed` those of 32 after it."""
    loader = Loader(replace(data, metadata_until=until), STAGES, seed=3, num_mtp_heads=1, vocab_size=VOCAB)
    always = Loader(replace(data, metadata_until=None), STAGES, seed=3, num_mtp_heads=1, vocab_size=VOCAB)
    for stage, begin, length in (("base", 0, 16), ("packed", 1536, 32)):
        for index in range(24 if stage == "packed" else 96):
            ours, full = (one.batch(stage, [index]).rows.weights_BS for one in (loader, always))
            has_prefix = not ours.equal(full)
            assert not (has_prefix and begin + index * length < until)
            if begin + index * length >= until:
                source = loader.batch(stage, [index]).sources[0]
                tokens = loader.batch(stage, [index]).rows.tokens_BS[0].tolist()
                assert ours[0].tolist() == [weight_of_tokens(source, 0.0)[token] for token in tokens]


def test_a_limit_for_metadata_that_no_source_has_is_refused(data) -> None:
    stages = {"base": replace(STAGES["base"], mix={"b": 1.0, "d": 1.0})}
    with pytest.raises(DataError, match=r"^data\.metadata_until=\d+: no document of b, d has a metadata prefix: build"):
        Loader(data, stages, seed=3, num_mtp_heads=1, vocab_size=VOCAB)


def test_a_new_stage_changes_nothing_before_it_and_another_seed_changes_all(data, undisturbed) -> None:
    known, grown = undisturbed(False, ()), undisturbed(True, ())
    assert {step: grown[step] for step in known} == known
    assert len(grown) == len(known) + 3
    other = stream(data, STAGES, (), Part(1, 1, 1), seed=4)
    assert all(other[step] != known[step] for step in known)
