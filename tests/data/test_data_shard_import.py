import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from steptron.cli.main import main
from steptron.data.source import ShardedSource, read_info
from tokenizers import Tokenizer

DOCUMENTS = [[3, 1, 2, 0], [0], [2, 2, 0], [1] * 50 + [0]]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    model = {"type": "BPE", "vocab": {"<eos>": 0, "a": 1, "b": 2, "c": 3}, "merges": []}
    made = Tokenizer.from_str(json.dumps({"model": model}))
    made.add_special_tokens(["<eos>"])
    made.save(str(tmp_path / "tokens.json"))
    return tmp_path / "tokens.json"


def megatron(prefix: Path, documents: list[list[int]], code: int = 8, **changed: list[int]) -> Path:
    """Write a shard by the byte layout alone, a sequence a document; keywords replace its arrays."""
    letter = {8: "H", 4: "i"}[code]
    width = struct.calcsize(letter)
    lengths = [len(ids) for ids in documents]
    arrays = {
        "lengths": lengths,
        "pointers": [width * sum(lengths[:n]) for n in range(len(lengths))],
        "bounds": list(range(len(lengths) + 1)),
        **changed,
    }
    formats = {"lengths": "i", "pointers": "q", "bounds": "q"}
    body = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    for name, values in arrays.items():
        body += struct.pack(f"<{len(values)}{formats[name]}", *values)
    prefix.parent.mkdir(exist_ok=True)
    Path(f"{prefix}.idx").write_bytes(body)
    ids = [token for document in documents for token in document]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(ids)}{letter}", *ids))
    return prefix


def datatrove(path: Path, documents: list[list[int]], letter: str = "H") -> Path:
    """Write NAME.ds and its index, as datatrove's TokenizedFile does: the ids, and the end of each document."""
    ids = [token for document in documents for token in document]
    path.write_bytes(struct.pack(f"<{len(ids)}{letter}", *ids))
    ends = np.cumsum([len(document) for document in documents]).tolist()
    Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    return path


def adopt(out: Path, *words: object) -> int:
    return main(["data", "import", *map(str, words), "--out", str(out), "--name", "web", "--workers", "2"])


@pytest.mark.parametrize("code", [8, 4])
def test_megatron_shards_are_linked_and_read_token_for_token(
    tmp_path: Path, tokenizer: Path, capsys, code: int
) -> None:
    first = megatron(tmp_path / "in" / "web.v1", DOCUMENTS, code)
    second = megatron(tmp_path / "in" / "more", DOCUMENTS[::-1], code)
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    words = (first, f"{second}.bin", f"{second}.idx", "--tokenizer", tokenizer)
    assert adopt(tmp_path / "out", *words) == 0
    shown = capsys.readouterr().out
    assert "web: 118 tokens in 8 documents, 2 shards, vocabulary 4, documents end with <eos> (id 0)" in shown
    source = ShardedSource(tmp_path / "out" / "web")
    tokens = np.full(source.num_tokens, -1)
    lengths = source.read_into(0, tokens)
    assert tokens.tolist() == [token for document in DOCUMENTS + DOCUMENTS[::-1] for token in document]
    assert lengths.tolist() == [len(ids) for ids in DOCUMENTS + DOCUMENTS[::-1]]
    assert {path: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before
    links = sorted(path.resolve() for path in source.folder.iterdir() if path.is_symlink())
    assert links == sorted((tmp_path / "in").iterdir())
    assert (source.info.max_token_id, source.info.num_text_bytes, source.info.action) == (3, 0, "import")
    assert adopt(tmp_path / "out", *words) == 0
    assert "already imported from the same files" in capsys.readouterr().out
    assert main(["data", "verify", str(tmp_path / "out")]) == 0
    assert main(["data", "inspect", str(tmp_path / "out")]) == 0
    assert "unknown" in capsys.readouterr().out  # bytes a token
    Path(f"{first}.bin").write_bytes(b"")
    assert main(["data", "verify", str(tmp_path / "out")]) == 2
    assert f"run `steptron data import {first} {second}.bin" in capsys.readouterr().err


@pytest.mark.parametrize("letter", ["H", "I"])
def test_datatrove_files_are_linked_and_read_token_for_token(tmp_path: Path, tokenizer: Path, letter: str) -> None:
    path = datatrove(tmp_path / "00000_shuffled.ds", DOCUMENTS, letter)
    assert adopt(tmp_path / "out", path, "--tokenizer", tokenizer) == 0
    source = ShardedSource(tmp_path / "out" / "web")
    assert [source.document(n).tolist() for n in range(4)] == DOCUMENTS
    assert (source.folder / "shard-00000.bin").resolve() == path


def test_documents_of_several_shards_by_number(tmp_path: Path, tokenizer: Path) -> None:
    for number in range(3):
        megatron(tmp_path / "in" / f"s{number}", DOCUMENTS[number : number + 1])
    assert adopt(tmp_path / "out", *sorted((tmp_path / "in").glob("*.bin")), "--tokenizer", tokenizer) == 0
    source = ShardedSource(tmp_path / "out" / "web")
    assert [source.document(n).tolist() for n in range(3)] == DOCUMENTS[:3]


BAD = {
    "no eos": ({"documents": [[1, 0], [2, 3], [0]]}, r"s\.bin: document 1 ends with token 3, not with the end"),
    "id": ({"documents": [[1, 4, 0]]}, r"s\.bin: token id 4 does not fit a vocabulary of 4"),
    "negative id": ({"documents": [[1, -1, 0]], "code": 4}, r"s\.bin: token id -1 does not fit"),
    "unsorted pointers": (
        {"documents": [[1, 0], [2, 0], [3, 0]], "pointers": [0, 8, 4], "lengths": [2, 2, 4]},
        r"s\.idx is damaged .*: sequence 0 and the next do not follow one another",
    ),
    "first pointer": ({"documents": [[1, 0]], "pointers": [2], "lengths": [1]}, r"s\.idx .* does not begin at byte 0"),
    "bounds": ({"documents": [[1, 0]] * 3, "bounds": [0, 2, 1, 3]}, r"s\.idx .*: document 1 ends before it begins"),
    "no tokens": ({"documents": [[]]}, r"s: no tokens there"),
}


@pytest.mark.parametrize(("shard", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_shard_is_refused_in_one_line_that_names_the_file(
    tmp_path: Path, tokenizer: Path, capsys, shard: dict, message: str
) -> None:
    prefix = megatron(tmp_path / "in" / "s", **shard)
    assert adopt(tmp_path / "out", prefix, "--tokenizer", tokenizer) == 2
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    assert re.search(message, line)
    assert str(tmp_path / "in" / "s") in line
    assert not (tmp_path / "out" / "web").exists()


def test_a_datatrove_index_that_does_not_fit_is_refused(tmp_path: Path, tokenizer: Path, capsys) -> None:
    path = datatrove(tmp_path / "a.ds", DOCUMENTS)
    path.write_bytes(path.read_bytes()[:-1])
    assert adopt(tmp_path / "out", path, "--tokenizer", tokenizer) == 2
    assert "a.ds.index does not fit" in capsys.readouterr().err
    path.unlink()
    assert adopt(tmp_path / "out", path, "--tokenizer", tokenizer) == 2
    assert f"{path} does not exist: name shards as" in capsys.readouterr().err


def test_a_tokenizer_is_needed_and_must_be_that_of_the_folder(tmp_path: Path, tokenizer: Path, capsys) -> None:
    prefix = megatron(tmp_path / "in" / "s", DOCUMENTS)
    assert adopt(tmp_path / "out", prefix) == 2
    assert "tokenizer.json does not exist" in capsys.readouterr().err
    assert adopt(tmp_path / "out", prefix, "--tokenizer", tokenizer) == 0
    other = tmp_path / "other.json"
    other.write_text(tokenizer.read_text().replace('"b"', '"d"'))
    assert adopt(tmp_path / "out", prefix, "--tokenizer", other) == 2
    assert "is not --tokenizer" in capsys.readouterr().err
    assert read_info(tmp_path / "out" / "web").eos == "<eos>"
