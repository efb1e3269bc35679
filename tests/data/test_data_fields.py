"""The fields of a record: prefix and spans of a document, the same from every kind of input, and what is refused."""

import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as parquet
import pytest
from steptron.data.documents import file_items
from steptron.data.fields import Fields, MarkedText, Metadata, parse_metadata
from steptron.data.opening import NotReadable
from steptron.data.readers import Unread
from steptron.errors import DataError

FIELDS = Fields("doc.body", parse_metadata(["type,doc.lang", "year, domain=wiki"]), "masks")
RECORDS = [
    {"type": "qa", "year": 2001, "doc": {"body": "who? ä𝄞", "lang": "en"}, "masks": [[0, 5]]},
    {"type": None, "year": None, "doc": {"body": "one two three", "lang": ""}, "masks": [[0, 3], [3, 4], [8, 13]]},
    {"type": "code", "year": -1, "doc": {"body": "x = 1", "lang": "python 3"}, "masks": []},
]
EXPECTED = [
    ("who? ä𝄞", "type: qa | lang: en | year: 2001 | domain: wiki\n", ((0, 5),)),
    ("one two three", "domain: wiki\n", ((0, 3), (3, 4), (8, 13))),
    ("x = 1", "type: code | lang: python 3 | year: -1 | domain: wiki\n", ()),
]


def write_jsonl(path: Path, records: list) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_dataset(path: Path, records: list) -> None:
    datasets.Dataset.from_list(records).save_to_disk(str(path))


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.parquet": lambda path, records: parquet.write_table(pa.Table.from_pylist(records), path),
    "a.feather": lambda path, records: feather.write_feather(pa.Table.from_pylist(records), str(path), "uncompressed"),
    "a": write_dataset,
}


def read(path: Path, fields: Fields) -> list[str | Unread]:
    items, unread = file_items([str(path)], fields)
    return [*unread, *(document for item in items for document in item.documents())]


@pytest.mark.parametrize("name", WRITERS)
def test_prefix_and_spans_come_with_every_kind_of_input(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, RECORDS)
    found = read(tmp_path / name, FIELDS)
    assert all(isinstance(text, MarkedText) for text in found)
    assert [(str(text), text.prefix, text.spans) for text in found if isinstance(text, MarkedText)] == EXPECTED
    [line] = read(tmp_path / name, Fields("doc.body", parse_metadata(["doc.land"])))[:1]
    assert re.search(r"has no field 'doc\.land'; there are .*'doc\.lang'.*: name one with --metadata", str(line))


def test_a_file_of_text_has_only_the_values_of_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    [text] = read(tmp_path / "a.txt", Fields(metadata=parse_metadata(["domain=books"])))
    assert isinstance(text, MarkedText)
    assert (text, text.prefix, text.spans) == ("words", "domain: books\n", ())
    [line] = read(tmp_path / "a.txt", FIELDS)
    assert str(line).endswith("a.txt is text, without a field 'masks': leave out --mask-field, or the file")
    [line] = read(tmp_path / "a.txt", Fields(metadata=parse_metadata(["language"])))
    assert str(line).endswith("without a field 'language': give it a value, --metadata language=VALUE")


def test_other_metadata_and_masks_are_another_input(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "b.txt").write_text("b")
    for name, options in (("a.jsonl", [["x"], ["x=1"], ["x", "y"], ["a.x"]]), ("b.txt", [["x=1"], ["x=2"]])):
        choices = [Fields(), *(Fields(metadata=parse_metadata(one)) for one in options)]
        choices += [Fields(masks="m")] if name == "a.jsonl" else []
        origins = {file_items([str(tmp_path / name)], fields)[0][0].origin for fields in choices}
        assert len(origins) == len(choices)


BAD = {
    "no spans": ({"m": None}, None),
    "no list": ({"m": 3}, r"'m' must be a list of spans \[start, end\] of characters, not a int"),
    "no pairs": ({"m": [1, 2]}, r"must be a list of spans .*, not 1"),
    "three bounds": ({"m": [[1, 2, 3]]}, r"not \[1, 2, 3\]"),
    "no numbers": ({"m": [["0", "1"]]}, r"not \['0', '1'\]"),
    "truth values": ({"m": [[False, True]]}, r"not \[False, True\]"),
    "behind the text": ({"m": [[0, 5]]}, r"with 0 ≤ start < end ≤ 4, the length of the text, not \[0, 5\]"),
    "before the text": ({"m": [[-1, 2]]}, r"not \[-1, 2\]"),
    "empty": ({"m": [[2, 2]]}, r"not \[2, 2\]"),
    "overlapping": ({"m": [[0, 3], [2, 4]]}, r"in order and apart, and \[2, 4\] begins before 3"),
    "unsorted": ({"m": [[2, 4], [0, 1]]}, r"in order and apart, and \[0, 1\] begins before 4"),
    "no field of spans": ({"n": []}, r"has no field 'm'; there are 'text', 'k', 'n': name one with --mask-field"),
    "metadata in two lines": ({"m": [], "k": "a\nb"}, r"'k' must be one line without `\|`, it is metadata"),
    "metadata with a bar": ({"m": [], "k": "a | b"}, r"'k' must be one line without `\|`"),
    "metadata of a list": ({"m": [], "k": ["a"]}, r"'k' must be text or a whole number, not a list"),
    "metadata of a number": ({"m": [], "k": 0.5}, r"'k' must be text or a whole number, not a float"),
    "half a pair": ({"m": [], "k": "\ud800"}, r"'k' has half of a surrogate pair"),
}


@pytest.mark.parametrize(("record", "message"), BAD.values(), ids=BAD.keys())
def test_bad_metadata_and_spans_are_told_in_one_line(record: dict, message: str | None) -> None:
    fields = Fields(metadata=(Metadata("k", "k"),), masks="m")
    record = {"text": "text", "k": "v", **record}
    if message is None:
        assert fields.document(record) == "text"
        return
    with pytest.raises(NotReadable, match=message) as caught:
        fields.document(record)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["", "a,,b", "a b", "a=", "=b", "a=x|y", "a=x\ny", "a,b.a", "a,a=1", "."])
def test_bad_options_of_metadata_are_refused(option: str) -> None:
    with pytest.raises(DataError, match=r"^--metadata .*(must be a field, such as|is given twice)"):
        parse_metadata([option])
