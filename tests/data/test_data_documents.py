import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from steptron.data import documents
from steptron.data.documents import by_hash, file_items
from steptron.errors import DataError

TEXTS = [f"text {index} " + "ä€𝄞\n" * (index % 7) for index in range(60)]


def read(spec: Path | str, field: str = "text") -> list[str]:
    return [text for item in file_items(str(spec), field) for text in item.documents()]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, field: text}, ensure_ascii=False) + "\n" for text in texts))
    return path


def test_folder_takes_text_by_suffix_in_an_order_that_depends_on_names_only(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        for index in range(20):
            path = tmp_path / folder / f"d{index % 3}" / f"{index}.{['txt', 'md', 'py'][index % 3]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"file {index}")
    (tmp_path / "one" / "image.png").write_bytes(b"\xff")
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
    monkeypatch.setattr(documents, "_PIECE", piece)
    assert read(path) == TEXTS


def test_parquet_by_row_group(tmp_path: Path) -> None:
    table = pa.table({"id": list(range(60)), "body": TEXTS})
    parquet.write_table(table, tmp_path / "web.parquet", row_group_size=17)
    items = file_items(str(tmp_path / "web.parquet"), "body")
    assert len(items) == 4
    assert all(item.num_bytes > 0 for item in items)
    assert read(tmp_path, "body") == TEXTS


def test_a_folder_that_datasets_saved(tmp_path: Path, monkeypatch) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(60))})
    rows.save_to_disk(str(tmp_path / "rows"))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "splits"))
    monkeypatch.setattr(documents, "_PIECE", 200)
    assert len(file_items(str(tmp_path / "rows"), "text")) > 3
    assert read(tmp_path / "rows") == read(tmp_path / "splits" / "train") == TEXTS
    with pytest.raises(DataError, match=r"holds several splits: name one of .*splits/train, .*splits/test"):
        read(tmp_path / "splits")
    with pytest.raises(DataError, match="no field 'body'; there are 'text', 'id': name one with --text-field"):
        read(tmp_path / "rows", "body")


BAD = {
    "no field": (
        '{"text": "a"}\n{"body": "b"}\n',
        r"line at byte 14: no field 'text'; there are 'body': .*--text-field",
    ),
    "no JSON": ('{"text": "a"}\n{"text": \n', r"line at byte 14: not JSON"),
    "no object": ('["a"]\n', r"line at byte 0: must be a JSON object, not a list"),
    "no text": ('{"text": 3}\n', r"the field 'text' must be text, not a int"),
    "surrogate": ('{"text": "\\ud800"}\n', r"half of a surrogate pair"),
}


@pytest.mark.parametrize(("contents", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_record_is_named_by_its_place(tmp_path: Path, contents: str, message: str) -> None:
    (tmp_path / "web.jsonl").write_text(contents)
    with pytest.raises(DataError, match=r"web\.jsonl, the " + message if "line" in message else message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 at byte 3"):
        read(tmp_path)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"cut\.parquet is not a complete Parquet file"):
        read(tmp_path / "cut.parquet")
    parquet.write_table(pa.table({"id": [1]}), tmp_path / "ids.parquet")
    with pytest.raises(DataError, match=r"ids\.parquet: no field 'text'; there are 'id'"):
        read(tmp_path / "ids.parquet")


@pytest.mark.parametrize("spec", ["absent", "empty", "absent/**/*.txt"])
def test_a_spec_without_documents_is_refused(tmp_path: Path, spec: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no documents found: give `demo`, a file or folder"):
        read(tmp_path / spec)


def test_by_hash_shuffles() -> None:
    names = [f"{index}" for index in range(100)]
    assert by_hash(names, str) == by_hash(names[::-1], str) != names
