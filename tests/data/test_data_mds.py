import gzip
import json
import re
import struct
from pathlib import Path

import pytest
from steptron.data.documents import file_items
from steptron.data.fields import Fields, MarkedText, Metadata
from steptron.data.readers import Unread

TEXTS = [f"text {n} " + "ä€𝄞" * (n % 4) for n in range(10)]


def write_shard(texts: list[bytes], extras: list[bytes] | None = None) -> bytes:
    """A shard by the byte layout alone: the columns extra (own size), id (8 bytes) and text (own size)."""
    samples = []
    for number, text in enumerate(texts):
        extra = extras[number] if extras else b"x" * (number % 3)
        samples.append(struct.pack("<II", len(extra), len(text)) + extra + struct.pack("<q", number) + text)
    config = b'{"version": 2}'
    begin = 4 + 4 * (len(samples) + 1) + len(config)
    ends = [begin]
    for sample in samples:
        ends.append(ends[-1] + len(sample))
    return struct.pack(f"<I{len(ends)}I", len(samples), *ends) + config + b"".join(samples)


def write_mds(folder: Path, shards: list[bytes], *, packed: bool = False, encoding: str = "str") -> Path:
    folder.mkdir()
    infos = []
    for number, data in enumerate(shards):
        name = f"shard.{number:05d}.mds"
        (folder / (name + (".gz" if packed else ""))).write_bytes(gzip.compress(data) if packed else data)
        infos.append(
            {
                "column_names": ["extra", "id", "text"],
                "column_encodings": ["bytes", "int", encoding],
                "column_sizes": [None, 8, None],
                "format": "mds",
                "raw_data": {"basename": name, "bytes": len(data)},
                "zip_data": {"basename": name + ".gz", "bytes": 1} if packed else None,
            }
        )
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": infos}))
    return folder


def read(folder: Path, field: str = "text") -> tuple[list[str], list[str]]:
    items, unread = file_items([str(folder)], Fields(field))
    found = [*unread, *(document for item in items for document in item.documents())]
    return [text for text in found if isinstance(text, str)], [
        str(place) for place in found if isinstance(place, Unread)
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_the_text_of_every_sample_is_read_in_order(tmp_path: Path, packed: bool) -> None:
    encoded = [text.encode() for text in TEXTS]
    folder = write_mds(tmp_path / "mds", [write_shard(encoded[:6]), write_shard(encoded[6:])], packed=packed)
    assert read(folder) == (TEXTS, [])
    (tmp_path / "z.txt").write_text("beside it")
    assert read(tmp_path) == (["beside it", *TEXTS], [])


def test_metadata_and_spans_come_from_other_columns(tmp_path: Path) -> None:
    folder = write_mds(tmp_path / "mds", [write_shard([b"one", b"two"])])
    fields = Fields(metadata=(Metadata("number", "id"),))
    [item], _ = file_items([str(folder)], fields)
    assert [text.prefix for text in item.documents() if isinstance(text, MarkedText)] == ["number: 0\n", "number: 1\n"]
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0] |= {"column_names": ["masks", "id", "text"], "column_encodings": ["json", "int", "str"]}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "shard.00000.mds").write_bytes(write_shard([b"one", b"two"], [b"[[0, 2]]", b"2"]))
    [item], _ = file_items([str(folder)], Fields(masks="masks"))
    marked, line = item.documents()
    assert isinstance(marked, MarkedText)
    assert (marked, marked.spans) == ("one", ((0, 2),))
    assert str(line).endswith(
        "sample 1: the field 'masks' must be a list of spans [start, end] of characters, not a int: fix it"
    )
    bad = write_mds(tmp_path / "bad", [write_shard([b"one"])])
    assert "has no text in the field 'extra', but bytes" in str(file_items([str(bad)], Fields(masks="extra"))[1][0])


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    good = write_shard([b"good", b"", b"caf\xe9", b"good"])
    texts, lines = read(write_mds(tmp_path / "texts", [good]))
    assert texts == ["good", "good"]
    assert [re.sub(r".*mds, ", "", line) for line in lines] == [
        "sample 1: the field 'text' is empty: leave it out",
        "sample 2: is not UTF-8: convert it or leave it out",
    ]
    for number, stop in enumerate([-3, 2, 15, 50]):
        texts, [line] = read(write_mds(tmp_path / f"cut{number}", [write_shard([b"good"] * 3)[:stop]]))
        assert texts == ["good"] * len(texts) != ["good"] * 3
        assert re.search(r"shard\.00000\.mds, after \d samples: cannot be read further", line)
    gone = write_mds(tmp_path / "gone", [good])
    (gone / "shard.00000.mds").unlink()
    assert "gone lacks its shard shard.00000.mds: copy it again" in read(gone)[1][0]
    assert "has no field 'body'; there are 'extra', 'id', 'text'" in read(tmp_path / "texts", "body")[1][0]
    ids = write_mds(tmp_path / "ids", [good], encoding="ndarray:uint16")
    assert "has no text in the field 'text', but ndarray:uint16" in read(ids)[1][0]
