import bz2
import gzip
import json
import lzma
import os
import random
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from steptron.data import readers
from steptron.data.documents import by_hash, file_items
from steptron.data.fields import Fields
from steptron.data.readers import Unread
from steptron.errors import DataError

TEXTS = [f"text {index} " + "ä€𝄞\n" * (index % 7) for index in range(60)]


def read_all(spec: Path | str, field: str = "text") -> tuple[list[str], list[str]]:
    """The texts of a spec, and a line for everything that is not read."""
    items, unread = file_items([str(spec)], Fields(field))
    found = [*unread, *(document for item in items for document in item.documents())]
    return [text for text in found if isinstance(text, str)], [
        str(place) for place in found if isinstance(place, Unread)
    ]


def read(spec: Path | str, field: str = "text") -> list[str]:
    texts, unread = read_all(spec, field)
    assert not unread
    return texts


def unread(spec: Path | str, field: str = "text") -> str:
    """The one line for what is not read; nothing else is there."""
    texts, [line] = read_all(spec, field)
    assert not texts
    assert "\n" not in line
    return line


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, field: text}, ensure_ascii=False) + "\n" for text in texts))
    return path


def test_folder_takes_text_by_suffix_in_an_order_that_depends_on_names_only(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        for index in range(20):
            path = tmp_path / folder / f"d{index % 3}" / f"{index}.{['txt', 'md', 'py'][index % 3]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"file {index}")
    (tmp_path / "one" / ".hidden").mkdir()
    (tmp_path / "one" / ".hidden" / "note.txt").write_text("hidden")
    assert sorted(read(tmp_path / "one")) == sorted(f"file {index}" for index in range(20))
    assert read(tmp_path / "one") == read(tmp_path / "two") == read(f"{tmp_path}/two/**/*.*")
    assert read(tmp_path / "one") != sorted(read(tmp_path / "one"))


def test_a_file_or_pattern_is_taken_as_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "LICENCE").write_text("free")
    (tmp_path / "other").write_text("not asked for")
    assert read(tmp_path / "LICENCE") == read(f"{tmp_path}/LIC*") == ["free"]


@pytest.mark.parametrize("piece", [1, 7, 64, 1000, 10**9])
def test_pieces_of_jsonl_hold_every_line_once_and_in_order(tmp_path: Path, monkeypatch, piece: int) -> None:
    path = write_jsonl(tmp_path / "web.jsonl", TEXTS)
    path.write_text(path.read_text().replace("\n", "\n\n", 3).rstrip("\n"))
    monkeypatch.setattr(readers, "_PIECE", piece)
    assert read(path) == TEXTS


def test_parquet_by_row_group(tmp_path: Path) -> None:
    table = pa.table({"id": list(range(60)), "body": TEXTS})
    parquet.write_table(table, tmp_path / "web.parquet", row_group_size=17)
    items = file_items([str(tmp_path / "web.parquet")], Fields("body"))[0]
    assert len(items) == 4
    assert all(item.num_bytes > 0 for item in items)
    assert read(tmp_path, "body") == TEXTS


def test_a_folder_that_datasets_saved(tmp_path: Path, monkeypatch) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(60))})
    rows.save_to_disk(str(tmp_path / "rows"))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "splits"))
    monkeypatch.setattr(readers, "_PIECE", 200)
    assert len(file_items([str(tmp_path / "rows")])[0]) > 3
    assert read(tmp_path / "rows") == read(tmp_path / "splits" / "train") == TEXTS
    with pytest.raises(DataError, match=r"holds several splits: name one of .*splits/train, .*splits/test"):
        read(tmp_path / "splits")
    assert "no field 'body'; there are 'text', 'id': name one with --text-field" in unread(tmp_path / "rows", "body")


BAD = {
    "no field": ('{"body": "b", "a": {"c": 1}}\n', r"has no field 'text'; there are 'body', 'a\.c': .*--text-field"),
    "no JSON": ('{"text": \n', r"not JSON"),
    "no object": ('["a"]\n', r"must be a JSON object, not a list"),
    "no text": ('{"text": 3}\n', r"the field 'text' must be text, not a int"),
    "null": ('{"text": null}\n', r"the field 'text' must be text, not null"),
    "empty": ('{"text": ""}\n', r"the field 'text' is empty"),
    "surrogate": ('{"text": "\\ud800"}\n', r"the field 'text' has half of a surrogate pair"),
    "not UTF-8": (b'{"text": "caf\xe9"}\n', r"not JSON"),
    "cut off": ('{"text": "cut', r"not JSON"),
}


@pytest.mark.parametrize("piece", [8, 10**9])
@pytest.mark.parametrize(("contents", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_record_is_named_by_its_line_and_the_others_are_read(
    tmp_path: Path, monkeypatch, piece: int, contents: str | bytes, message: str
) -> None:
    monkeypatch.setattr(readers, "_PIECE", piece)
    bad = contents if isinstance(contents, bytes) else contents.encode()
    good = [json.dumps({"text": f"good {index}"}).encode() + b"\n" for index in range(5)]
    whole = b"\n".join([b"".join(good[:3]), bad])
    (tmp_path / "web.jsonl").write_bytes(whole + (b"".join(good[3:]) if bad.endswith(b"\n") else b""))
    texts, [line] = read_all(tmp_path)
    assert texts == [f"good {index}" for index in range(5 if bad.endswith(b"\n") else 3)]
    assert re.search(rf"web\.jsonl, line 5: {message}", line)
    assert "\n" not in line


def test_bad_files_are_named(tmp_path: Path) -> None:
    def refused(name: str, contents: bytes) -> str:
        (tmp_path / name).write_bytes(contents)
        return unread(tmp_path / name)

    assert "latin.txt is not UTF-8 at byte 3" in refused("latin.txt", b"caf\xe9")
    assert "cut.parquet is not a complete Parquet file" in refused("cut.parquet", b"PAR1")
    assert "cut.arrow is not a complete Arrow file" in refused("cut.arrow", b"ARROW1\0\0")
    assert "void.txt is empty" in refused("void.txt", b"")
    assert "void.jsonl is empty" in refused("void.jsonl", b"")
    assert "void.txt.gz is empty after decompression" in refused("void.txt.gz", gzip.compress(b""))
    assert "archive.zip is of an unknown binary kind" in refused("archive.zip", b"PK\x03\x04\0\0")
    assert "web.ds may hold tokens: make a source of it with `steptron data import`" in refused("web.ds", b"\1\0")
    assert "is Parquet inside gz: decompress it" in refused("packed.parquet.gz", gzip.compress(b"PAR1PAR1"))
    parquet.write_table(pa.table({"id": [1]}), tmp_path / "ids.parquet")
    assert "ids.parquet has no field 'text'; there are 'id'" in unread(tmp_path / "ids.parquet")
    assert "ids.parquet has no text in the field 'id', but int64" in unread(tmp_path / "ids.parquet", "id")


PACKERS = {
    "plain": lambda data: data,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


@pytest.mark.parametrize("name", ["c4.json", "c4.txt", "c4", "c4.jsonl", "c4.dat"])
@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS.keys())
def test_json_lines_are_known_by_content_under_any_name_and_compression(tmp_path: Path, pack, name: str) -> None:
    long = "a long document " * 10_000  # longer than what is read at first
    lines = "\n".join(json.dumps({"text": text}) for text in [long, *TEXTS]).encode()
    half = lines.index(b"\n", len(lines) * 9 // 10)
    for suffix in ("", ".gz", ".zst", ".odd"):  # a false suffix does no harm
        path = tmp_path / (name + suffix)
        # Compressed files may be several, one behind the other.
        path.write_bytes(pack(b"\xef\xbb\xbf" + lines[:half]) + pack(lines[half:]))
        assert read(path) == [long, *TEXTS]


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS.keys())
def test_text_is_read_from_any_compression(tmp_path: Path, pack) -> None:
    for name in ("a.txt", "b.md.gz"):
        (tmp_path / name).write_bytes(pack("{ a text, with a bracket }\näöü".encode()))
    (tmp_path / "c.rst").write_bytes(pack(b"[1]\na footnote"))
    assert sorted(read(tmp_path)) == ["[1]\na footnote", *["{ a text, with a bracket }\näöü"] * 2]


@pytest.mark.parametrize("pack", list(PACKERS.values())[1:], ids=list(PACKERS)[1:])
def test_a_damaged_compressed_file_is_told(tmp_path: Path, pack) -> None:
    rng = random.Random(0)
    lines = "".join(json.dumps({"text": f"{rng.getrandbits(4000):x}"}) + "\n" for _ in range(600)).encode()
    (tmp_path / "cut.jsonl").write_bytes(pack(lines)[:-30_000])
    texts, [line] = read_all(tmp_path)
    assert len(texts) < 600
    assert re.search(r"cut\.jsonl, (after|line) \d+.*(copy it again|leave it out)", line) or "cannot be read" in line
    (tmp_path / "cut.jsonl").write_bytes(pack(lines)[:9])
    assert "cut.jsonl" in unread(tmp_path)


VALUES = {
    "object": {"text": "a"},
    "array": [{"text": "a"}, {"text": "b"}],
    "array of texts": ["a", "b"],
    "array of numbers": [1, 2, 3],
}


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "indented"])
@pytest.mark.parametrize("name", ["a.json", "a.txt", "a.md", "a", "a.py", "a.yaml"])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_json_is_never_taken_for_text(tmp_path: Path, value: object, name: str, indent: int | None) -> None:
    (tmp_path / name).write_text(json.dumps(value, indent=indent))
    if isinstance(value, dict) and indent is None:
        assert read(tmp_path / name) == ["a"]
    else:
        assert re.search(name + " is JSON, but not JSON lines .*convert it", unread(tmp_path / name))


def test_json_lines_of_another_field_or_a_bad_first_line_are_not_taken_for_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('{"body": "a"}\n')
    assert "a.txt, line 1: has no field 'text'" in unread(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text('{"text": "cut off\n{"text": "b"}\n')
    assert "a.txt is JSON, but not JSON lines" in unread(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text('["a"]\n["b"]\n')
    assert "a.txt is JSON, but not JSON lines" in unread(tmp_path / "a.txt")


def test_a_folder_of_several_kinds_yields_all_of_them_and_names_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    kinds = {"a.jsonl": "plain", "b.jsonl.gz": "gz", "c.json": "plain", "deep/d.json.zst": "zst", "e": "xz"}
    for name, packer in kinds.items():
        (folder / name).write_bytes(PACKERS[packer](json.dumps({"text": name}).encode()))
    parquet.write_table(pa.table({"text": ["parquet"]}), folder / "f.parquet")
    (folder / "deep" / "g.txt").write_text("text")
    datasets.Dataset.from_dict({"text": ["rows"]}).save_to_disk(str(folder / "h"))
    with pa.OSFile(str(folder / "i.arrow"), "wb") as file, pa.ipc.new_file(file, pa.schema({"text": "string"})) as out:
        out.write(pa.record_batch({"text": ["arrow"]}))
    expected = sorted([*kinds, "parquet", "text", "rows", "arrow"])
    assert sorted(read(folder)) == expected
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.pyc").write_bytes(b"\0")
    (folder / "image.png").write_bytes(b"\x89PNG\0")
    (folder / "LICENCE").write_text("free")
    (folder / "deep" / "link.txt").symlink_to("absent")
    (folder / "deep" / "linked").symlink_to(folder / "h")
    texts, lines = read_all(folder)
    assert sorted(texts) == expected
    assert [line.removeprefix(f"{folder}/").split(":")[0] for line in lines] == [
        "LICENCE is of an unknown kind (suffix '')",
        "deep/link.txt cannot be read (No such file or directory)",
        "deep/linked is a link to a folder",
        "image.png is of an unknown binary kind",
    ]


def test_a_folder_that_a_pattern_matches_is_searched_and_a_file_found_twice_is_read_once(tmp_path: Path) -> None:
    for name in ("a/one.txt", "a/deep/two.txt", "b/three.txt", "four"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    everything = ["a/deep/two.txt", "a/one.txt", "b/three.txt", "four"]
    assert sorted(read(f"{tmp_path}/*")) == everything  # as a shell would pass them on, one by one
    assert sorted(read(f"{tmp_path}/**/*")) == everything
    assert sorted(read(f"{tmp_path}/[ab]")) == everything[:3]
    several, _ = file_items([f"{tmp_path}/a", f"{tmp_path}/*/*.txt", f"{tmp_path}/four", f"{tmp_path}/a"])
    assert sorted(text for item in several for text in item.documents() if isinstance(text, str)) == everything
    with pytest.raises(DataError, match="absent: no documents found"):
        file_items([f"{tmp_path}/a", f"{tmp_path}/absent"])


def test_a_list_names_inputs_relative_to_its_folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "lists").mkdir()
    for name in ("a.txt", "lists/b.txt", "lists/c 1.txt", "lists/c 2.txt", "absolute.txt"):
        (tmp_path / name).write_text(name)
    lines = ["# all", "", "../a.txt", "  b.txt \r", "c*.txt", str(tmp_path / "absolute.txt")]
    (tmp_path / "lists" / "all").write_text("\ufeff" + "\n".join(lines))
    expected = sorted(["a.txt", "lists/b.txt", "lists/c 1.txt", "lists/c 2.txt", "absolute.txt"])
    assert sorted(read(f"@{tmp_path}/lists/all")) == expected
    monkeypatch.chdir(tmp_path / "lists")
    assert sorted(read("@all")) == expected
    (tmp_path / "lists" / "@odd").write_text("a file with such a name")
    assert read("@odd") == ["a file with such a name"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.txt\n\nb.txt\n", r"list, line 3: \S+b\.txt does not exist: fix or remove the line"),
        ("a*.txt\nb*", r"list, line 2: \S+b\* does not exist"),
        ("# nothing\n\n", r"@\S+list: the list has no inputs: write one per line"),
        (None, r"@\S+list: the list cannot be read \(No such file or directory\): give a file of inputs"),
    ],
    ids=["absent file", "absent pattern", "empty", "absent list"],
)
def test_a_bad_list_is_refused_by_its_line(tmp_path: Path, text: str | None, message: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    if text is not None:
        (tmp_path / "list").write_text(text)
    with pytest.raises(DataError, match=message):
        file_items([f"@{tmp_path}/list"])


def test_relative_and_absolute_inputs_go_together(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    monkeypatch.chdir(tmp_path)
    items, _ = file_items(["a.txt", f"{tmp_path}/b.txt"])
    assert {text for item in items for text in item.documents()} == {"a", "b"}


def test_a_pipe_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert "pipe.txt is not a regular file" in unread(tmp_path / "pipe.txt")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream", "dataset"])
def test_a_row_that_is_not_utf8_is_named_and_the_others_are_read(tmp_path: Path, kind: str) -> None:
    offsets = np.cumsum([0, 3, 4, 3], dtype=np.int32)
    column = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(offsets), pa.py_buffer(b"onecaf\xe9two")])
    table = pa.table({"text": column})
    if kind == "parquet":
        parquet.write_table(table, tmp_path / "a.parquet")
    elif kind == "dataset":
        datasets.Dataset(table).save_to_disk(str(tmp_path / "a"))
    else:
        make = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with make(tmp_path / "a.arrow", table.schema) as file:
            file.write_table(table)
    texts, [line] = read_all(tmp_path)
    assert texts == ["one", "two"]
    assert re.search(r"a(\.\w+)?(, row group 0)?, row 1: is not UTF-8", line)


@pytest.mark.parametrize("piece", [1, 500, 10**9])
def test_pieces_of_an_arrow_file_hold_every_row_once_and_in_order(tmp_path: Path, monkeypatch, piece: int) -> None:
    table = pa.table({"text": TEXTS})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=7)
    monkeypatch.setattr(readers, "_PIECE", piece)
    items, _ = file_items([str(tmp_path)])
    assert len(items) == {1: 9, 500: len(items), 10**9: 1}[piece]
    assert read(tmp_path) == TEXTS


def test_an_arrow_file_without_rows_is_read(tmp_path: Path) -> None:
    with pa.ipc.new_file(tmp_path / "a.arrow", pa.schema({"text": "string"})):
        pass
    assert read(tmp_path) == []


def test_a_folder_or_file_without_permission_is_told(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "shut").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    scandir, open_ = os.scandir, Path.open

    def no_folder(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    def no_file(path, *arguments, **options):
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, *arguments, **options)

    monkeypatch.setattr(os, "scandir", no_folder)
    monkeypatch.setattr(Path, "open", no_file)
    texts, lines = read_all(tmp_path)
    assert texts == ["a"]
    assert [line.removeprefix(f"{tmp_path}/") for line in lines] == [
        "b.txt cannot be read (Permission denied): copy it again or leave it out",
        "shut cannot be opened (Permission denied): leave it out",
    ]


@pytest.mark.parametrize("kind", ["json", "parquet", "arrow", "stream", "dataset"])
def test_a_nested_field_is_named_with_dots(tmp_path: Path, kind: str) -> None:
    records = [{"id": n, "doc": {"body": text, "more": {"body": text + "!"}}} for n, text in enumerate(TEXTS)]
    table = pa.Table.from_pylist(records)
    if kind == "json":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    elif kind == "parquet":
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=25)
    elif kind == "dataset":
        datasets.Dataset(table).save_to_disk(str(tmp_path / "a"))
    else:
        make = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with make(tmp_path / "a.arrow", table.schema) as file:
            file.write_table(table, max_chunksize=25)
    assert read(tmp_path, "doc.body") == TEXTS
    assert read(tmp_path, "doc.more.body") == [text + "!" for text in TEXTS]
    lines = read_all(tmp_path, "doc.title")[1]
    assert all(re.search(r"has no field 'doc\.title'; there are 'id', 'doc\.body', 'doc\.more", line) for line in lines)
    assert any("a" in line for line in lines)


def test_a_field_whose_own_name_has_a_dot_comes_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a.b": "own", "a": {"b": "nested"}}\n')
    assert read(tmp_path, "a.b") == ["own"]
    parquet.write_table(pa.table({"a.b": ["own"]}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", "a.b") == ["own"]


@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"caf\xe9.jsonl", b"caf\xe9.parquet", b"caf\xe9.arrow"])
def test_a_file_name_that_is_not_utf8_is_read(tmp_path: Path, name: bytes) -> None:
    path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
    writers = {
        ".txt": lambda: b"good",
        ".jsonl": lambda: b'{"text": "good"}\n',
        ".parquet": lambda: _stored(lambda sink: parquet.write_table(pa.table({"text": ["good"]}), sink)),
        ".arrow": lambda: _stored(_arrow_of_one),
    }
    path.write_bytes(writers[path.suffix]())
    assert read(tmp_path) == read(path) == ["good"]
    path.write_bytes(b"\xff")
    assert f"caf\\xe9{path.suffix}" in read_all(tmp_path)[1][0]


def _stored(write) -> bytes:
    sink = pa.BufferOutputStream()
    write(sink)
    return sink.getvalue().to_pybytes()


def _arrow_of_one(sink) -> None:
    with pa.ipc.new_file(sink, pa.schema({"text": "string"})) as out:
        out.write(pa.record_batch({"text": ["good"]}))


@pytest.mark.parametrize("spec", ["absent", "empty", "absent/**/*.txt"])
def test_a_spec_without_documents_is_refused(tmp_path: Path, spec: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no documents found: give `demo`, a file or folder"):
        read(tmp_path / spec)


def test_by_hash_shuffles() -> None:
    names = [f"{index}" for index in range(100)]
    assert by_hash(names, str) == by_hash(names[::-1], str) != names
