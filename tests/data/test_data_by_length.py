from itertools import accumulate, product
from pathlib import Path

import numpy as np
import pytest
from steptron.data import by_length
from steptron.data.by_length import DocumentsByLength
from steptron.data.source import ShardedSource
from steptron.errors import DataError

SHARDS = [
    [[*range(1, n % 13 + 1), 0] for n in range(50)],
    [[5, 0], []],
    [],
    [[*range(20, 20 + n), 0] for n in range(30)],
]
DOCUMENTS = [ids for shard in SHARDS for ids in shard]


@pytest.fixture
def folder(write_source) -> Path:
    return write_source("prose", SHARDS)


@pytest.mark.parametrize("block", [4096, 7], ids=["one block a shard", "many blocks"])
@pytest.mark.parametrize(("least", "most"), [(None, 5), (9, None), (4, 12), (30, 30)])
def test_the_stream_is_the_chosen_documents_one_after_another(
    folder: Path, monkeypatch, block: int, least: int | None, most: int | None
) -> None:
    monkeypatch.setattr(by_length, "_BLOCK", block)
    stream = DocumentsByLength(ShardedSource(folder), least, most)
    chosen = [ids for ids in DOCUMENTS if (least or 1) <= len(ids) <= (most or 99)]
    flat, ends = [token for ids in chosen for token in ids], [0, *accumulate(map(len, chosen))]
    owner = [number for number, ids in enumerate(chosen) for _ in ids]
    assert (stream.num_tokens, stream.num_documents) == (len(flat), len(chosen))
    for start, stop in product(range(0, len(flat), 29), range(1, len(flat) + 1, 31)):
        if start < stop:
            tokens = np.full(stop - start, -1)
            lengths = stream.read_into(start, tokens)
            documents = np.repeat(np.arange(len(lengths)), lengths)
            assert tokens.tolist() == stream.tokens(start, stop).tolist() == flat[start:stop]
            assert documents.tolist() == [owner[place] - owner[start] for place in range(start, stop)]
            borders = [end for end in ends if start < end < stop]
            before, after = max(end for end in ends if end <= start), min(end for end in ends if end >= stop)
            assert stream.borders(start, stop).tolist() == [before, *borders, after]


def test_limits_that_match_nothing_are_refused_in_one_line(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"no document of .*prose has at least 1,000 tokens; they have 0 to 30: "
    ) as caught:
        DocumentsByLength(ShardedSource(folder), 1000, None)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"has at least 15 and at most 14 tokens"):
        DocumentsByLength(ShardedSource(folder), 15, 14)
