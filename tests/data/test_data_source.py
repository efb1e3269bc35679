import json
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steptron.data.megatron_format import NEGATIVE, largest_id
from steptron.data.source import ShardedSource, read_info, source_folders
from steptron.errors import DataError

SHARDS = [[[1, 2, 0], [3, 0]], [[4, 0]], [], [[5, 6, 7, 8, 0], [9, 0], [10, 11, 0]]]
FLAT = [token for shard in SHARDS for ids in shard for token in ids]


@pytest.fixture
def folder(write_source) -> Path:
    return write_source("prose", SHARDS)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, len(FLAT) - 1), length=st.integers(1, len(FLAT)))
def test_any_range_across_shards_with_its_documents(folder: Path, start: int, length: int) -> None:
    stop = min(start + length, len(FLAT))
    tokens = np.full(stop - start, -1)
    lengths = ShardedSource(folder).read_into(start, tokens)
    assert tokens.tolist() == FLAT[start:stop]
    # A document ends with its 0, also where the next one is in another shard.
    expected = [FLAT[start:place].count(0) for place in range(start, stop)]
    assert np.repeat(np.arange(len(lengths)), lengths).tolist() == expected
    assert lengths.all()


def test_more_shards_than_are_kept_open(write_source) -> None:
    folder = write_source("many", [[[index, 0]] for index in range(90)])
    source = ShardedSource(folder)
    for _ in range(2):
        tokens = np.full(180, -1)
        assert source.read_into(0, tokens).tolist() == [2] * 90
        assert tokens.tolist() == [token for index in range(90) for token in (index, 0)]


@pytest.mark.parametrize("place", [0, 17, 39, 40, 61])
def test_a_file_that_was_changed_later_is_refused_with_the_document(write_source, place: int) -> None:
    lengths = [[1, 10, 7, 1, 21], [3, 19]]
    folder = write_source("changed", [[[7] * (length - 1) + [0] for length in shard] for shard in lengths])
    shard, within = divmod(place, 40)
    with (folder / f"shard-0000{shard}.bin").open("r+b") as file:
        file.seek(2 * within)
        file.write((8).to_bytes(2, "little"))
    document = sum(end <= within for end in accumulate(lengths[shard]))
    source = ShardedSource(folder)
    message = (
        rf"changed: token id 8 in document {document} of shard-0000{shard}\.bin is outside of 0 … 7, the ids that "
    )
    with pytest.raises(DataError, match=message):
        source.read_into(0, np.empty(62, dtype=np.int64))
    with pytest.raises(DataError, match="changed: token id 8 is outside"):
        source.check(source.tokens(0, 62))


@pytest.mark.parametrize("code", ["<u1", "<i1", "<i2", "<i4", "<i8", "<u2"])
def test_the_largest_id_is_found_in_every_type(code: str) -> None:
    most = int(np.iinfo(code).max)
    assert largest_id(np.array([0, 3, 2], dtype=code)) == 3
    assert largest_id(np.array([0, most, 2], dtype=code)) == most
    if "i" in code:
        for negative in (-1, -most - 1):
            assert largest_id(np.array([5, negative, most], dtype=code)) == NEGATIVE > 2**40


def test_identity_is_that_of_the_tokens(write_source) -> None:
    first, copy = write_source("one", SHARDS), write_source("two", SHARDS, spec="other")
    other = write_source("three", [[[1, 2, 0]]])
    assert read_info(first).identity == read_info(copy).identity != read_info(other).identity


def test_sources_of_a_folder(folder: Path, write_source, tmp_path: Path) -> None:
    other = write_source("code", SHARDS)
    write_source(".tmp-late", SHARDS)
    assert source_folders(tmp_path) == [other, folder]
    assert source_folders(folder) == [folder]


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def edit(folder: Path, **fields: object) -> None:
    path = folder / "source.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


DAMAGE = {
    "no folder": (lambda folder: folder.rename(folder.parent / "away"), r"prose does not exist: .*data build"),
    "no source.json": (lambda folder: (folder / "source.json").unlink(), r"prose has no source\.json: .*data build"),
    "no bin": (
        lambda folder: (folder / "shard-00003.bin").unlink(),
        r"shard-00003\.bin is missing, source\.json says 20: .* `steptron data build 'some text' --out",
    ),
    "bin cut": (
        lambda folder: shorten(folder / "shard-00000.bin"),
        r"shard-00000\.bin has 8 bytes, source\.json says 10: copy it again, or remove .*prose and run",
    ),
    "no idx": (lambda folder: (folder / "shard-00001.idx").unlink(), r"shard-00001\.idx is missing"),
    "no JSON": (lambda folder: shorten(folder / "source.json"), r"source\.json is damaged or of another version"),
    "other version": (lambda folder: edit(folder, format="9"), r"source\.json is damaged or of another version"),
    "unknown field": (lambda folder: edit(folder, colour="red"), r"source\.json is damaged or of another version"),
    "counts": (lambda folder: edit(folder, num_tokens=99), r"num_tokens=99, but its shards sum to 17"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_source_is_refused_in_one_line(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        ShardedSource(folder)
    assert "\n" not in str(caught.value)


def test_an_empty_source_is_refused(write_source) -> None:
    with pytest.raises(DataError, match=r"hollow is empty \(0 tokens\): build it from documents with text"):
        ShardedSource(write_source("hollow", [[]]))


def test_a_changed_byte_is_found_by_the_checksums(folder: Path) -> None:
    assert sum(ShardedSource(folder).verify()) == ShardedSource(folder).num_file_bytes
    path = folder / "shard-00003.bin"
    path.write_bytes(b"\x63" + path.read_bytes()[1:])
    with pytest.raises(DataError, match=r"shard-00003\.bin is damaged \(checksum mismatch\).*data build"):
        list(ShardedSource(folder).verify())
