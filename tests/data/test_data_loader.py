import itertools
import json
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from steptron.config.schema import DataConfig, LrConfig, SourceConfig, StageConfig
from steptron.data.loader import Batch, Loader, Prefetcher
from steptron.data.pack import Concatenated
from steptron.data.source import ShardedSource
from steptron.errors import DataError

CODE = [[[*range(1, 60), 0] for _ in range(20)], [[*range(30, 90), 0] for _ in range(11)]]
PROSE = [[[*range(1, 1 + length), 0] for length in range(1, 40)]]
EOS = 0


def stage(seq_len: int, **mix: float) -> StageConfig:
    return StageConfig(tokens=10_000, seq_len=seq_len, batch_size=4, mix=mix, lr=LrConfig(peak=1e-3))


STAGES = {"base": stage(32, code=0.7, prose=0.3), "long": stage(256, code=1, prose=1)}


@pytest.fixture
def data(write_source, tokenizer_file: Path) -> DataConfig:
    sources = {
        name: SourceConfig(path=str(write_source(name, shards))) for name, shards in [("code", CODE), ("prose", PROSE)]
    }
    return DataConfig(sources=sources, tokenizer=str(tokenizer_file))


def open_loader(
    data: DataConfig, stages=STAGES, seed: int = 1, num_mtp_heads: int = 2, vocab_size: int = 100
) -> Loader:
    return Loader(data, stages, seed, num_mtp_heads, vocab_size)


def rows(batch: Batch) -> list[tuple[list[int], list[int], str]]:
    return list(zip(batch.rows.tokens_BS.tolist(), batch.rows.documents_BS.tolist(), batch.sources, strict=True))


def test_a_batch_has_the_stages_length_and_room_for_all_targets(data: DataConfig) -> None:
    for name, config in STAGES.items():
        batch = open_loader(data).batch(name, range(5))
        assert batch.rows.tokens_BS.shape == batch.rows.documents_BS.shape == (5, config.seq_len + 1 + 2)
        assert (batch.rows.tokens_BS.dtype, batch.rows.documents_BS.dtype) == (torch.int64, torch.int32)


def test_tokens_by_source_are_those_of_the_rows(data: DataConfig) -> None:
    loader = open_loader(data)
    for indices in (range(10), range(13, 50), range(7, 7)):
        rows_of = Counter(loader.batch("base", indices).sources if len(indices) else ())
        assert loader.tokens_by_source("base", indices) == {name: 32 * rows for name, rows in rows_of.items()}


def test_documents_end_where_their_eos_is(data: DataConfig) -> None:
    loader = open_loader(data)
    borders, after_eos = Counter(), Counter()
    for tokens, documents, source in rows(loader.batch("base", range(40))):
        for place in range(1, len(tokens)):
            is_border = documents[place] != documents[place - 1]
            borders[source] += is_border
            after_eos[source] += tokens[place - 1] == EOS
            assert is_border or tokens[place - 1] != EOS
    # Borders without EOS are those where an epoch's last token meets the next one's first: few.
    assert all(0 <= borders[source] - after_eos[source] <= 3 for source in ("code", "prose"))


def test_rows_do_not_depend_on_batches_order_or_ranks(data: DataConfig) -> None:
    whole = rows(open_loader(data).batch("base", range(24)))
    for ranks in (1, 2, 3):
        loaders = [open_loader(data) for _ in range(ranks)]
        share = 24 // ranks
        parts = [rows(loaders[rank].batch("base", range(rank * share, (rank + 1) * share))) for rank in range(ranks)]
        assert list(itertools.chain.from_iterable(parts)) == whole
    loader = open_loader(data)
    backwards = [rows(loader.batch("base", [index]))[0] for index in range(23, -1, -1)]
    assert backwards[::-1] == whole
    assert rows(open_loader(data).batch("long", range(24))) != whole
    assert rows(open_loader(data, seed=2).batch("base", range(24))) != whole


@pytest.mark.parametrize("source", ["code", "prose"])
def test_equal_stages_of_different_names_read_a_source_in_another_order(data: DataConfig, source: str) -> None:
    loader = open_loader(data, {"first": stage(32, **{source: 1}), "second": stage(32, **{source: 1})})
    assert rows(loader.batch("first", range(8))) != rows(loader.batch("second", range(8)))


@pytest.mark.parametrize("source", ["code", "prose"])
def test_each_seed_reads_each_source_in_an_order_of_its_own(data: DataConfig, source: str) -> None:
    """With one source in the mix, which other sources a seed draws from cannot be what makes the rows differ."""
    orders = [
        rows(open_loader(data, {"base": stage(32, **{source: 1})}, seed=seed).batch("base", range(16)))
        for seed in range(4)
    ]
    alike = [(a, b) for a, b in itertools.combinations(range(4), 2) if orders[a] == orders[b]]
    assert not alike, f"pairs of seeds with the same order: {alike}"


def test_rows_are_the_sources_samples_by_seed_stage_and_name(data: DataConfig) -> None:
    """Row n of a stage with one source is its sample n, packed in the order that seed, stage and source name."""
    stream = ShardedSource(Path(data.sources["code"].path))
    for seed in (1, 2):
        loader = open_loader(data, {"base": stage(32, code=1)}, seed=seed)
        packing, expected = Concatenated(stream, 32, (seed, "base", "code")), []
        for ordinal in range(8):
            tokens = np.full(35, -1)
            lengths = packing.fill(ordinal, tokens, np.ones(35, dtype=np.float32))
            documents = [number for number, length in enumerate(lengths) for _ in range(length)]
            expected.append((tokens.tolist(), documents, "code"))
        assert rows(loader.batch("base", range(8))) == expected


def test_fingerprint_changes_with_the_data_and_not_with_budget_batch_or_place(
    data: DataConfig, write_source, tmp_path: Path
) -> None:
    def fingerprint(**options) -> str:
        return open_loader(**{"data": data, **options}).fingerprint

    same = {"base": STAGES["base"], "long": STAGES["long"]}
    mix = {"prose": 0.3, "code": 0.7}
    same["base"] = StageConfig(tokens=99, seq_len=32, batch_size=9, mix=mix, lr=LrConfig(peak=1.0))
    before = fingerprint()
    (tmp_path / "code").rename(tmp_path / "moved")
    data = DataConfig(
        sources={**data.sources, "code": SourceConfig(path=str(tmp_path / "moved"))}, tokenizer=data.tokenizer
    )
    assert fingerprint() == fingerprint(stages=same) == before
    other = write_source("other", [[[1, 2, 0]]])
    changed = DataConfig(sources={**data.sources, "code": SourceConfig(path=str(other))}, tokenizer=data.tokenizer)
    different = [
        fingerprint(),
        fingerprint(seed=2),
        fingerprint(num_mtp_heads=1),
        fingerprint(data=changed),
        fingerprint(stages={**STAGES, "long": stage(256, code=2, prose=1)}),
        fingerprint(stages={**STAGES, "long": stage(128, code=1, prose=1)}),
        fingerprint(stages={**STAGES, "long": replace(STAGES["long"], packing="best_fit")}),
        fingerprint(stages={**STAGES, "long": replace(STAGES["long"], min_length={"code": 2})}),
        fingerprint(stages={**STAGES, "long": replace(STAGES["long"], max_length={"code": 99})}),
    ]
    assert len(set(different)) == len(different)


def test_limits_of_length_choose_the_documents_of_a_stage(data: DataConfig) -> None:
    """The documents of `prose` have 2 to 40 tokens and count up from 1, so that each tells its length by its last id."""
    stages = {
        "all": stage(32, prose=1),
        "some": replace(stage(32, prose=1), min_length={"prose": 8}, max_length={"prose": 12}),
    }
    loader = open_loader(data, stages, num_mtp_heads=0)
    seen = {}
    for name in stages:
        batch = loader.batch(name, range(30))
        seen[name] = {
            before + 1
            for tokens, documents, _ in rows(batch)
            for (before, one), (token, other) in itertools.pairwise(zip(tokens, documents, strict=True))
            if token == EOS and one == other
        }
    assert seen["some"] == set(range(8, 13))
    assert len(seen["all"]) > 30
    assert loader.epoch_tokens("some") == {"prose": sum(range(8, 13))}


def test_limits_that_match_nothing_are_refused_at_the_start(data: DataConfig) -> None:
    stages = {"base": replace(stage(32, prose=1, code=1), min_length={"prose": 500})}
    with pytest.raises(
        DataError, match=r"^stages\.base, data\.sources\.prose: no document of .*prose has at least 500"
    ):
        open_loader(data, stages)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_stage_tells_how_often_it_reads_a_source_and_how_much_is_padding(data: DataConfig, packing: str) -> None:
    one = replace(stage(64, code=0.75, prose=0.25), packing=packing)
    loader = open_loader(data, {"base": one})
    for name, reading in loader.planned("base").items():
        epoch = loader.epoch_tokens("base")[name]
        rows = [row for row in range(-(-one.tokens // 64)) if loader.batch("base", [row]).sources == (name,)]
        assert (reading.tokens, reading.epochs) == (64 * len(rows), 64 * len(rows) / epoch)
        assert epoch * (1 - reading.waste) == pytest.approx(ShardedSource(Path(data.sources[name].path)).num_tokens)
        assert (reading.waste > 0) == (packing == "best_fit")


def test_padding_is_no_target(data: DataConfig) -> None:
    loader = open_loader(data, {"base": replace(stage(64, code=1), packing="best_fit")})
    batch = loader.batch("base", range(12))
    _, weights = batch.rows.targets(64, head=0)
    same = batch.rows.documents_BS[:, 1:65] == batch.rows.documents_BS[:, :64]
    real = batch.rows.weights_BS[:, 1:65] == 1
    assert torch.equal(weights > 0, same & real)
    assert not real.all()
    assert int((weights > 0).sum()) == sum(
        stop - start - 1 + (stop < end and stop - start == 64)
        for row in range(12)
        for start, stop, end in loader._packers["base", "code"].pieces(row)
    )


def test_another_tokenizer_is_refused(data: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"name": "other"}))
    with pytest.raises(
        DataError, match=r"^data\.sources\.code: .*code was built with tokenizer \w{32}, .*other\.json is \w{32}"
    ):
        open_loader(DataConfig(sources=data.sources, tokenizer=str(path)))
    # The layout of the JSON is not the tokenizer.
    original = json.loads(Path(data.tokenizer).read_text())
    path.write_text(json.dumps(original, indent=4))
    open_loader(DataConfig(sources=data.sources, tokenizer=str(path)))


@pytest.mark.parametrize("contents", [None, "{"], ids=["missing", "cut"])
def test_a_tokenizer_that_cannot_be_read_is_refused(data: DataConfig, tmp_path: Path, contents: str | None) -> None:
    path = tmp_path / "absent.json"
    if contents:
        path.write_text(contents)
    with pytest.raises(DataError, match=r"tokenizer .*absent\.json (does not exist|is not JSON)"):
        open_loader(DataConfig(sources=data.sources, tokenizer=str(path)))


@pytest.mark.parametrize("absent", ["tokenizer", "code"])
def test_data_that_is_not_built_is_named_with_the_recipes_command(data: DataConfig, absent: str) -> None:
    data = replace(data, build_command="make-my-data --all")
    gone = Path(data.tokenizer) if absent == "tokenizer" else Path(data.sources[absent].path) / "source.json"
    gone.unlink()
    key = "data.tokenizer" if absent == "tokenizer" else "data.sources.code"
    with pytest.raises(
        DataError, match=rf"^{key}: \S+ does not exist; build this recipe's data with `make-my-data --all`"
    ):
        open_loader(data)


def test_the_command_of_data_that_no_stage_reads_is_not_asked_for(data: DataConfig) -> None:
    sources = {**data.sources, "later": SourceConfig(path="nowhere")}
    open_loader(DataConfig(sources=sources, tokenizer=data.tokenizer, build_command="make-my-data"))


def test_ids_outside_of_the_models_vocabulary_are_refused_at_the_start(data: DataConfig) -> None:
    message = r"^data\.sources\.code: .* ids up to 89, they must be below model\.vocab_size=89: raise it to 90 or more"
    with pytest.raises(DataError, match=message):
        open_loader(data, vocab_size=89)
    open_loader(data, vocab_size=90)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("limits", [{}, {"code": 1}], ids=["all documents", "by length"])
@pytest.mark.parametrize("told", [5, 88], ids=["many too large", "one too large by one"])
def test_ids_that_source_json_does_not_tell_of_are_refused_when_read(
    data: DataConfig, write_source, told: int, limits: dict[str, int], packing: Literal["concatenate", "best_fit"]
) -> None:
    sources = {**data.sources, "code": SourceConfig(path=str(write_source("liar", CODE, max_token_id=told)))}
    stages = {"base": replace(stage(32, code=1), min_length=limits, packing=packing)}
    loader = open_loader(DataConfig(sources=sources, tokenizer=data.tokenizer), stages, vocab_size=told + 1)
    place = r"(in document \d+ of shard-0000[01]\.bin )?"
    message = rf"^data\.sources\.code: .*liar: token id \d+ {place}is outside of 0 … {told}"
    with pytest.raises(DataError, match=message):
        loader.batch("base", range(200))


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
def test_a_bad_source_is_refused_under_its_name_in_the_recipe(data: DataConfig, write_source, damage: str) -> None:
    folder = Path(data.sources["prose"].path)
    if damage == "truncated":
        (folder / "shard-00000.bin").write_bytes((folder / "shard-00000.bin").read_bytes()[:-2])
    elif damage == "missing":
        (folder / "shard-00000.bin").unlink()
    else:
        folder = write_source("hollow", [[]])
    sources = {**data.sources, "prose": SourceConfig(path=str(folder))}
    with pytest.raises(DataError, match=r"^data\.sources\.prose: .*(has \d+ bytes|is missing|is empty)") as caught:
        open_loader(DataConfig(sources=sources, tokenizer=data.tokenizer))
    assert "\n" not in str(caught.value)


def test_a_source_that_no_stage_draws_from_is_not_opened(data: DataConfig) -> None:
    sources = {**data.sources, "later": SourceConfig(path="nowhere")}
    open_loader(DataConfig(sources=sources, tokenizer=data.tokenizer))
    with pytest.raises(DataError, match=r"^data\.sources\.later: nowhere does not exist"):
        open_loader(DataConfig(sources=sources, tokenizer=data.tokenizer), {"base": stage(32, code=1, later=1)})


def test_prefetched_batches_are_those_of_the_loader_in_order(data: DataConfig) -> None:
    loader = open_loader(data)
    requests = [("base", range(start, start + 3)) for start in range(0, 30, 3)] + [("long", [7])]
    with Prefetcher(loader.batch, requests, depth=2) as batches:
        ahead = [rows(batch) for batch in batches]
    assert ahead == [rows(loader.batch(*request)) for request in requests]


def test_what_the_prefetching_thread_raises_reaches_the_caller(data: DataConfig) -> None:
    loader = open_loader(data)

    def requests():
        yield "base", range(2)
        raise DataError("the shelf is empty")

    with Prefetcher(loader.batch, requests()) as batches:
        iterator = iter(batches)
        next(iterator)
        with pytest.raises(DataError, match="the shelf is empty"):
            next(iterator)


def test_closing_ends_the_thread_though_requests_have_no_end(data: DataConfig) -> None:
    before = threading.active_count()
    with Prefetcher(open_loader(data).batch, (("base", [index]) for index in itertools.count()), depth=1) as batches:
        next(iter(batches))
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
