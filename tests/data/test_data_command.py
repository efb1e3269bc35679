import os
import random
from pathlib import Path

import pytest
from steptron.cli.main import main
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


def test_build_then_inspect(text_folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert build(text_folder, out, "--name", "letters", "--vocab-size", "400") == 0
    info = read_info(out / "letters")
    assert f"letters: {info.num_tokens:,} tokens in 20 documents" in capsys.readouterr().out
    assert build(text_folder, out, "--name", "letters", "--vocab-size", "400") == 0
    assert "already built from the same text" in capsys.readouterr().out
    for folder in (out, out / "letters"):
        assert main(["data", "inspect", str(folder)]) == 0
        shown = capsys.readouterr().out
        assert f"{info.num_tokens:,}" in shown
        assert "checksums match" in shown
    first = next(path for path in text_folder.iterdir() if path.read_text()[:20] in shown)
    assert first.suffix == ".txt"


def test_inspect_finds_a_changed_byte(text_folder: Path, tmp_path: Path, capsys) -> None:
    build(text_folder, tmp_path / "out", "--name", "letters", "--vocab-size", "400")
    path = tmp_path / "out" / "letters" / "shard-00000.bin"
    path.write_bytes(b"\x00\x01" + path.read_bytes()[2:])
    capsys.readouterr()
    assert main(["data", "inspect", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "shard-00000.bin is damaged (checksum mismatch)" in error
    assert main(["data", "inspect", str(tmp_path / "out"), "--no-checksums"]) == 0
    assert "sizes match" in capsys.readouterr().out


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
    assert read_info(out / "coffee").spec.endswith("caf\\xe9.txt")


def test_a_platform_without_affinity_builds(text_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    words = ["data", "build", str(text_folder), "--out", str(tmp_path / "out"), "--name", "a", "--vocab-size", "300"]
    assert main(words) == 0
