import os
import random
from pathlib import Path

import pytest
from steptron.cli.main import main
from steptron.data.readers import Unread
from steptron.data.source import read_info


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    rng = random.Random(0)
    (tmp_path / "my texts").mkdir()
    for index in range(20):
        words = ["".join(rng.choices("abcdefgh", k=rng.randrange(2, 7))) for _ in range(200)]
        (tmp_path / "my texts" / f"{index}.txt").write_text(" ".join(words))
    return tmp_path / "my texts"


def build(folder: Path, out: Path, *options: str) -> int:
    return main(["data", "build", str(folder), "--out", str(out), "--workers", "1", *options])


def test_build_then_inspect_and_verify(text_folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert build(text_folder, out, "--name", "letters", "--vocab-size", "400") == 0
    info = read_info(out / "letters")
    shown = capsys.readouterr().out
    assert f"letters: {info.num_tokens:,} tokens in 20 documents" in shown
    assert "one is trained on this text alone (for several sources, train it first" in shown
    assert build(text_folder, out, "--name", "letters", "--vocab-size", "400") == 0
    shown = capsys.readouterr().out
    assert "already built from the same text" in shown
    assert "is trained" not in shown
    for folder in (out, out / "letters"):
        assert main(["data", "inspect", str(folder)]) == 0
        shown = capsys.readouterr().out
        assert f"{info.num_tokens:,}" in shown
        assert f"letters: from '{text_folder}'; documents end with <|endoftext|> (id 0)" in shown
        assert main(["data", "verify", str(folder)]) == 0
        assert "letters: 2 files, checksums match" in capsys.readouterr().out
    first = next(path for path in text_folder.iterdir() if path.read_text()[:20] in shown)
    assert first.suffix == ".txt"


def test_inspect_shows_lengths_samples_and_what_was_not_read(write_source, tmp_path: Path, capsys) -> None:
    shards = [[[7, 0], [7, 7, 7, 0]], [], [[0]] * 12 + [[9] * 70 + [0]]]
    unread = tuple(Unread(f"web.jsonl, line {n}:", "is bad") for n in range(12))
    write_source("web", shards, unread=unread, spec="web.jsonl", eos="<eos>")
    (tmp_path / "tokenizer.json").unlink()
    assert main(["data", "inspect", str(tmp_path / "web"), "--samples", "3"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    begin = lines.index("web: from web.jsonl; documents end with <eos> (id 0)")
    assert lines[begin + 1] == f"12 inputs were not read (all are listed in {tmp_path}/web/source.json):"
    assert lines[begin + 2] == "web.jsonl, line 0: is bad"
    assert lines[begin + 12] == "and 2 more"
    assert lines[begin + 14 : begin + 21] == [
        "1 12 12 13.5% #####",
        "2 to 3 1 2 2.2% #",
        "4 to 7 1 4 4.5% ##",
        "8 to 15 0 0 0.0%",
        "16 to 31 0 0 0.0%",
        "32 to 63 0 0 0.0%",
        "64 to 127 1 71 79.8% ################################",
    ]
    assert lines[begin + 21].startswith("document 0 of 2 tokens: [7, 0] (no ")
    assert [line.split(":")[0] for line in lines[begin + 22 : begin + 24]] == [
        "document 5 of 1 tokens",
        "document 10 of 1 tokens",
    ]
    assert main(["data", "inspect", str(tmp_path / "web"), "--samples", "15"]) == 0
    assert "document 14 of 71 tokens: [9, 9, " in capsys.readouterr().out


def test_verify_finds_a_changed_byte_in_any_file_of_any_source(write_source, tmp_path: Path, capsys) -> None:
    for name in ("one", "two"):
        write_source(name, [[[1, 2, 0]], [[3, 0]]])
    for path in sorted(tmp_path.glob("*/shard*")):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert main(["data", "verify", str(tmp_path)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"error: {path} is damaged (checksum mismatch)")
        path.write_bytes(whole)
    assert main(["data", "verify", str(tmp_path)]) == 0


def test_inspect_finds_another_tokenizer(text_folder: Path, tmp_path: Path, capsys) -> None:
    build(text_folder, tmp_path / "out", "--name", "letters", "--vocab-size", "400")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert main(["data", "inspect", str(tmp_path / "out")]) == 2
    assert "restore the tokenizer.json it was built with" in capsys.readouterr().err


BAD: dict[str, tuple[list[str], str]] = {
    "no name": (["data", "build", "FOLDER", "--out", "OUT"], "is not a name for a source"),
    "bad name": (["data", "build", "FOLDER", "--out", "OUT", "--name", "a/b"], "--name=a/b is not a name for a source"),
    "no workers": (["data", "build", "FOLDER", "--out", "OUT", "--workers", "0"], "--workers=0 must be at least 1"),
    "named demo": (["data", "build", "demo", "--out", "OUT", "--name", "a"], "demo names its own sources"),
    "no spec": (["data", "build", "absent", "--out", "OUT"], "absent: no documents found"),
    "no tokenizer": (
        ["data", "build", "FOLDER", "--out", "OUT", "--name", "a", "--tokenizer", "absent.json"],
        "tokenizer absent.json does not exist",
    ),
    "no name for several": (["data", "build", "FOLDER", "FOLDER", "--out", "OUT"], "give its name with --name"),
    "demo and more": (["data", "build", "demo", "FOLDER", "--out", "OUT"], "demo is two sources of its own"),
    "no model in the cache": (
        ["data", "build", "FOLDER", "--out", "OUT", "--name", "a", "--tokenizer", "no-such/model"],
        "no model whose tokenizer.json is in the local cache",
    ),
    "no tokenizer in a folder": (
        ["data", "build", "FOLDER", "--out", "OUT", "--name", "a", "--tokenizer", "FOLDER"],
        "the folder has no tokenizer.json",
    ),
    "some weights": (["data", "tokenizer", "FOLDER=1", "b", "--out", "OUT", "--vocab-size", "300"], "b has no weight"),
    "weight 0": (["data", "tokenizer", "FOLDER=0", "--out", "OUT", "--vocab-size", "300"], "weight must be above 0"),
    "no number": (["data", "tokenizer", "a=b", "--out", "OUT", "--vocab-size", "300"], "'b' is not a number"),
    "twice": (["data", "tokenizer", "a=1", "a=2", "--out", "OUT", "--vocab-size", "300"], "a is given twice"),
    "no samples": (["data", "inspect", "FOLDER", "--samples", "-1"], "--samples=-1 must be at least 0"),
    "no folder": (["data", "inspect", "absent"], "absent does not exist: name the folder of one source"),
    "no source": (["data", "inspect", "FOLDER"], "has no source.json"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(
    text_folder: Path, tmp_path: Path, capsys, words: list[str], message: str
) -> None:
    places: dict[str, str] = {"FOLDER": str(text_folder), "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_build_prints_what_was_not_read_and_the_end_of_a_document(text_folder: Path, tmp_path: Path, capsys) -> None:
    (text_folder / "web.json").write_text('{"text": "good"}\n{"text": "cut off\n')
    options = ("--name", "letters", "--vocab-size", "400")
    assert build(text_folder, tmp_path / "out", *options) == 2
    [error] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "web.json, line 2: not JSON" in error
    assert "--skip-bad N" in error
    assert build(text_folder, tmp_path / "out", *options, "--skip-bad", "1") == 0
    shown = capsys.readouterr().out
    assert "documents end with <|endoftext|> (id 0)" in shown
    assert "1 inputs were not read" in shown
    assert "web.json, line 2: not JSON" in shown
    assert read_info(tmp_path / "out" / "letters").eos == "<|endoftext|>"


def test_a_spec_that_is_not_utf8_is_escaped_in_source_json(tmp_path: Path, capsys) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("".join(f"some text {n} " for n in range(2000)))
    out = tmp_path / "out"
    assert build(tmp_path / name, out) == 2
    assert "'caf\\\\xe9' is not a name for a source" in capsys.readouterr().err
    assert build(tmp_path / name, out, "--name", "coffee", "--vocab-size", "260") == 0
    assert read_info(out / "coffee").spec.endswith("caf\\xe9.txt'")


def test_a_platform_without_affinity_builds(text_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    words = ["data", "build", str(text_folder), "--out", str(tmp_path / "out"), "--name", "a", "--vocab-size", "300"]
    assert main(words) == 0
