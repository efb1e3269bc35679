import struct
import tracemalloc
from itertools import chain, pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steptron.data.megatron_format import _TYPES, IndexedDataset, IndexedWriter, write_index
from steptron.errors import DataError

DOCUMENTS = st.lists(st.lists(st.integers(0, 99), max_size=12), max_size=12)
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def flatten(lists: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def read_plainly(prefix: Path) -> list[list[int]]:
    """The documents of a shard, by the byte layout alone and one number at a time."""
    idx, ids = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert idx[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, bounds = struct.unpack_from("<QBQQ", idx, 9)
    assert version == 1
    letter, width = {8: ("H", 2), 4: ("i", 4)}[code]
    lengths = struct.unpack_from(f"<{sequences}i", idx, 34)
    pointers = struct.unpack_from(f"<{sequences}q", idx, 34 + 4 * sequences)
    first = struct.unpack_from(f"<{bounds}q", idx, 34 + 12 * sequences)
    assert len(idx) == 34 + 12 * sequences + 8 * bounds
    assert len(ids) == width * sum(lengths)
    read = [
        list(struct.unpack_from(f"<{length}{letter}", ids, at)) for length, at in zip(lengths, pointers, strict=True)
    ]
    return [flatten(read[begin:end]) for begin, end in pairwise(first)]


def write_plainly(prefix: Path, documents: list[list[list[int]]], modes: bool = False) -> None:
    """Documents of several sequences, as int32, in the byte layout."""
    sequences = [sequence for document in documents for sequence in document]
    first, starts = [0], [0]
    for document in documents:
        first.append(first[-1] + len(document))
    for sequence in sequences:
        starts.append(starts[-1] + 4 * len(sequence))
    body = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(sequences), len(first))
    body += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    body += struct.pack(f"<{len(sequences)}q", *starts[:-1]) + struct.pack(f"<{len(first)}q", *first)
    Path(f"{prefix}.idx").write_bytes(body + bytes(len(sequences) if modes else 0))
    ids = [token for sequence in sequences for token in sequence]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(ids)}i", *ids))


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 100) -> Path:
    writer = IndexedWriter(prefix, vocab_size)
    for ids in documents:
        writer.add_document(ids)
    writer.finish()
    return prefix


@pytest.mark.parametrize("vocab_size", [100, 65_499, 65_500, 200_000])
@SAME_FOLDER
@given(documents=DOCUMENTS)
def test_what_is_written_is_read_by_an_independent_reader(tmp_path: Path, vocab_size: int, documents) -> None:
    documents = [[*ids, vocab_size - 1] for ids in documents]
    prefix = write(tmp_path / "shard.v1", documents, vocab_size)
    assert read_plainly(prefix) == documents
    assert Path(f"{prefix}.bin").stat().st_size == sum(map(len, documents)) * (2 if vocab_size < 65_500 else 4)


@SAME_FOLDER
@given(documents=st.lists(DOCUMENTS, max_size=5), modes=st.booleans())
def test_documents_of_several_or_no_sequences_are_read(tmp_path: Path, documents, modes: bool) -> None:
    write_plainly(tmp_path / "shard", documents, modes)
    flat = [flatten(document) for document in documents]
    dataset = IndexedDataset(tmp_path / "shard")
    assert dataset.num_documents == len(flat)
    assert [dataset.document(index).tolist() for index in range(len(flat))] == flat
    assert dataset.tokens(0, dataset.num_tokens).tolist() == flatten(flat)


@SAME_FOLDER
@given(documents=DOCUMENTS, start=st.integers(0, 200), length=st.integers(0, 200))
def test_the_tokens_of_a_range_by_document(tmp_path: Path, documents, start: int, length: int) -> None:
    dataset = IndexedDataset(write(tmp_path / "shard", documents))
    start = min(start, max(dataset.num_tokens - 1, 0))
    stop = min(start + length, dataset.num_tokens)
    owners = [number for number, ids in enumerate(documents) for _ in ids][start:stop]
    if start < stop:
        assert dataset.parts(start, stop).tolist() == [owners.count(number) for number in sorted(set(owners))]


@pytest.mark.parametrize("token", [-1, 100, 70_000])
def test_an_id_outside_of_the_vocabulary_is_not_written(tmp_path: Path, token: int) -> None:
    with pytest.raises(DataError, match=f"token id {token} does not fit a vocabulary of 100"):
        IndexedWriter(tmp_path / "shard", 100).add_document([1, token])


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


def overwrite(path: Path, offset: int, value: bytes) -> None:
    contents = bytearray(path.read_bytes())
    contents[offset : offset + len(value)] = value
    path.write_bytes(contents)


DAMAGE = {
    "no bin": (lambda prefix: Path(f"{prefix}.bin").unlink(), r"shard\.bin is missing, its \.idx says 14"),
    "no idx": (lambda prefix: Path(f"{prefix}.idx").unlink(), r"shard\.idx is missing"),
    "bin longer": (
        lambda prefix: Path(f"{prefix}.bin").write_bytes(bytes(16)),
        r"shard\.bin has 16 bytes, its \.idx says 14",
    ),
    "bin cut": (lambda prefix: cut(Path(f"{prefix}.bin"), 3), r"shard\.bin has 11 bytes, its \.idx says 14"),
    "idx cut": (lambda prefix: cut(Path(f"{prefix}.idx"), 8), r"shard\.idx has \d+ bytes, its header says \d+"),
    "idx empty": (lambda prefix: cut(Path(f"{prefix}.idx"), 82), r"shard\.idx is not a Megatron index"),
    "magic": (lambda prefix: overwrite(Path(f"{prefix}.idx"), 0, b"XX"), r"shard\.idx is not a Megatron index"),
    "version": (lambda prefix: overwrite(Path(f"{prefix}.idx"), 9, b"\x02"), r"version 2, type code 8"),
    "floats": (lambda prefix: overwrite(Path(f"{prefix}.idx"), 17, b"\x07"), r"type code 7"),
    "bounds": (lambda prefix: overwrite(Path(f"{prefix}.idx"), 58, b"\x01"), r"shard\.idx is damaged"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_shard_is_refused_in_one_line(tmp_path: Path, damage, message: str) -> None:
    prefix = write(tmp_path / "shard", [[1, 2, 3], [4, 5, 6, 7]])
    damage(prefix)
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(prefix)
    assert "\n" not in str(caught.value)


@SAME_FOLDER
@given(documents=st.lists(DOCUMENTS, max_size=5), start=st.integers(0, 200), length=st.integers(1, 200))
def test_borders_and_lengths_of_documents(tmp_path: Path, documents, start: int, length: int) -> None:
    write_plainly(tmp_path / "shard", documents)
    dataset = IndexedDataset(tmp_path / "shard")
    lengths = [len(flatten(document)) for document in documents]
    assert flatten([part.tolist() for part in dataset.lengths()]) == lengths
    if not dataset.num_tokens:
        return
    start = min(start, dataset.num_tokens - 1)
    stop = min(start + length, dataset.num_tokens)
    ends = sorted({sum(lengths[:index]) for index in range(len(lengths) + 1)})
    inside = [end for end in ends if start < end < stop]
    expected = [max(e for e in ends if e <= start), *inside, min(e for e in ends if e >= stop)]
    assert dataset.borders(start, stop).tolist() == expected


def test_many_documents_of_very_different_lengths_are_found(tmp_path: Path) -> None:
    """A guess from the mean length is far off here."""
    lengths = [1] * 5000 + [3000] * 20 + [0] * 2000 + [2] * 3000
    documents = [[1] * length for length in lengths]
    dataset, starts = IndexedDataset(write(tmp_path / "shard", documents)), np.cumsum([0, *lengths])
    for start in range(0, dataset.num_tokens - 700, 611):
        lengths = np.diff(starts.clip(start, start + 700))
        assert np.array_equal(dataset.parts(start, start + 700), lengths[lengths > 0])


def test_pointers_that_do_not_rise_are_refused_in_one_line(tmp_path: Path) -> None:
    prefix = write(tmp_path / "shard", [[1, 2, 3], [4, 5], [6], [7, 8]])
    overwrite(Path(f"{prefix}.idx"), 34 + 4 * 4 + 8, struct.pack("<q", 12))
    dataset = IndexedDataset(prefix)
    for read in (lambda: dataset.parts(0, 8), lambda: list(dataset.lengths())):
        with pytest.raises(DataError, match=r"shard\.idx is damaged: its pointers do not rise") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_file_that_becomes_shorter_is_refused_in_one_line(tmp_path: Path) -> None:
    prefix = write(tmp_path / "shard", [[1, 2, 3], [4, 5]])
    dataset = IndexedDataset(prefix)
    cut(Path(f"{prefix}.bin"), 4)
    with pytest.raises(DataError, match=r"shard\.bin has become shorter: copy it again"):
        dataset.tokens(2, 5)


def test_a_shard_of_a_hundred_million_documents_costs_no_memory(tmp_path: Path) -> None:
    count, prefix = 100_000_000, tmp_path / "shard"
    with open(f"{prefix}.idx", "wb") as idx:  # sparse: all documents are empty but for the last, of 5 tokens
        idx.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, count, count + 1))
        idx.seek(34 + 4 * (count - 1))
        idx.write(struct.pack("<i", 5))
        idx.seek(34 + 12 * count + 8 * (count - 1))
        idx.write(struct.pack("<qq", count - 1, count))
    Path(f"{prefix}.bin").write_bytes(np.arange(5, dtype="<u2").tobytes())
    tracemalloc.start()
    dataset = IndexedDataset(prefix)
    assert (dataset.num_documents, dataset.document(count - 1).tolist()) == (count, [0, 1, 2, 3, 4])
    assert dataset.parts(1, 5).tolist() == [4]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("code", _TYPES)
def test_ids_of_every_type_are_read_into_wide_numbers(tmp_path: Path, code: int) -> None:
    """Ids of each type become int64, at any place and in any number."""
    dtype = np.dtype(_TYPES[code])
    ids = np.random.default_rng(code).integers(0, np.iinfo(dtype).max, 700, dtype=dtype, endpoint=True)
    (tmp_path / "shard.bin").write_bytes(ids.tobytes())
    write_index(tmp_path / "shard.idx", dtype, np.array([700]))
    dataset, room = IndexedDataset(tmp_path / "shard"), np.full(900, -1)
    for start, count in product((0, 1, 13), (1, 2, 3, 4, 5, 8, 15, 16, 17, 100, 687)):
        found = room[start : start + count]
        assert dataset.tokens_into(start, found) == max(ids[start : start + count].tolist())
        assert found.tolist() == ids[start : start + count].tolist()
        assert (room[start + count :] == -1).all()
        found[:] = -1
