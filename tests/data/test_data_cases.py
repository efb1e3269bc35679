"""Inputs on which a build once went wrong without a word, from the command line to source.json."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from steptron.cli.main import main
from steptron.data.source import read_info
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

WORDS = "river stone light over under green market carry seven winter paper north quiet machine".split()


def records(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    return [{"id": n, "text": " ".join(rng.choices(WORDS, k=rng.randint(5, 40)))} for n in range(count)]


def lines(found: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in found)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with the special token <eos> and the ordinary one </s>."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(WORDS, trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet))
    made.add_tokens(["</s>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def json_lines_in_dot_json(folder: Path) -> None:
    (folder / "c4.json").write_text(lines(records(40, 1)))


def three_kinds(folder: Path) -> None:
    (folder / "a.jsonl").write_text(lines(records(40, 2)))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(records(40, 3)).encode()))
    (folder / "c.json").write_text(lines(records(40, 4)))


def nested_field(folder: Path) -> None:
    nested = [{"meta": {"n": 1}, "doc": {"body": record["text"]}} for record in records(50, 5)]
    (folder / "n.jsonl").write_text(lines(nested))


def bad_lines(folder: Path) -> None:
    (folder / "ok.jsonl").write_text(lines(records(100, 6)) + '{"text": null}\n{"text": "cut off\n')


def name_that_is_not_utf8(folder: Path) -> None:
    with open(os.path.join(os.fsencode(folder), b"caf\xe9.txt"), "wb") as file:
        file.write(b"plain text in a file with an old name\n" * 50)


def html_with_ends(folder: Path) -> None:
    (folder / "page.jsonl").write_text(lines([{"text": "<s>one</s><eos>"}, {"text": "two</s>"}]))


CASES: dict[str, tuple[Callable[[Path], None], list[str], int, list[str]]] = {
    "JSON lines in .json": (json_lines_in_dot_json, [], 40, []),
    "three kinds": (three_kinds, [], 120, []),
    "nested field": (nested_field, ["--text-field", "doc.body"], 50, []),
    "bad lines": (bad_lines, ["--skip-bad", "10"], 100, ["ok.jsonl, line 101:", "ok.jsonl, line 102:"]),
    "name that is not UTF-8": (name_that_is_not_utf8, [], 1, []),
    "ends in the text": (html_with_ends, [], 2, []),
}


@pytest.mark.parametrize(("make", "options", "count", "unread"), CASES.values(), ids=CASES.keys())
def test_every_document_is_read_or_listed(
    tmp_path: Path, tokenizer: Path, capsys, make, options: list[str], count: int, unread: list[str]
) -> None:
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    words = ["data", "build", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--name", "a", "--workers", "1"]
    words += ["--tokenizer", str(tokenizer)]
    if unread:
        assert main(words) == 2
        assert unread[0] in capsys.readouterr().err.splitlines()[-1]
    assert main([*words, *options]) == 0
    info = read_info(tmp_path / "out" / "a")
    assert info.num_documents == count
    assert [Path(place.place).name for place in info.unread] == unread
    assert (info.eos, info.eos_id) == ("<eos>", 0)
    shown = capsys.readouterr().out
    assert "documents end with <eos> (id 0)" in shown
    assert all(name in shown for name in unread)
    ids = b"".join(path.read_bytes() for path in sorted((tmp_path / "out" / "a").glob("*.bin")))
    ends = [n for n in range(0, len(ids), 2) if ids[n : n + 2] == b"\0\0"]
    assert len(ends) == count, "nothing in the text is taken for the end of a document"
