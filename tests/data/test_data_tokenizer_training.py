from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from steptron.cli.main import main
from steptron.data import tokenizer, tokenizer_training
from steptron.data.tokenizer_training import quotas, train_on
from tokenizers import Tokenizer


@dataclass
class Texts:
    """An item with its texts."""

    texts: list[str]
    origin: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.texts))

    def documents(self) -> Iterator[str]:
        yield from self.texts


def test_quotas_keep_the_shares_and_use_as_much_as_there_is(monkeypatch) -> None:
    monkeypatch.setattr(tokenizer_training, "MOST_BYTES", 1000)
    assert quotas({"a": 300, "b": 100}, None) == {"a": 300, "b": 100}
    assert quotas({"a": 3000, "b": 1000}, None) == {"a": 750, "b": 250}
    assert quotas({"a": 3000, "b": 1000}, {"a": 1, "b": 1}) == {"a": 500, "b": 500}
    assert quotas({"a": 3000, "b": 100}, {"a": 1, "b": 1}) == {"a": 100, "b": 100}
    assert quotas({"a": 50, "b": 0}, None) == {"a": 50, "b": 0}


def test_the_text_is_taken_evenly_and_by_weight(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer_training, "MOST_BYTES", 1200)
    used: list[str] = []
    monkeypatch.setattr(tokenizer, "train", lambda texts, vocab_size, path: used.extend(texts))
    sources = {name: [Texts([f"{name}{n:03}" + "x" * 6] * 10) for n in range(100)] for name in "ab"}
    done: list[int] = []
    taken, unread = train_on(
        sources, {"a": 3, "b": 1}, 300, tmp_path, lambda _, total: done.append(-total), done.append
    )
    assert taken == {name: sum(len(text) for text in used if text[0] == name) for name in "ab"} == {"a": 900, "b": 300}
    assert not unread
    assert sum(done) == 0
    places = [int(text[1:4]) for text in used if text[0] == "a"]
    assert min(places) < 10
    assert max(places) > 85
    assert len(set(places)) > 8


def test_the_command_trains_on_several_inputs_and_says_what_it_took(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"alpha{n}" for n in range(400)))
    (tmp_path / "b=2.txt").write_text(" ".join(f"beta{n}" for n in range(400)))
    out = tmp_path / "made" / "tokenizer.json"
    words = ["data", "tokenizer", f"{tmp_path}/a.txt", f"{tmp_path}/b=2.txt", "--out", str(out), "--vocab-size", "290"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert f"{out}: 290 tokens, trained on 6,578 bytes of text: {tmp_path}/a.txt 3,489 (53.0%)" in shown
    made = Tokenizer.from_file(str(out))
    assert {"alpha", "Ġbeta"} & set(made.get_vocab())
    assert made.get_vocab_size() == 290
    assert main(words) == 2
    assert "tokenizer.json exists: remove it" in capsys.readouterr().err
    words[words.index("--out") + 1] = str(tmp_path / "a.txt" / "tokenizer.json")
    assert main(words) == 2
    assert "the training stopped, " in capsys.readouterr().err
    (tmp_path / "void.jsonl").write_text('{"text": ""}\n')
    words = ["data", "tokenizer", f"{tmp_path}/a.txt=1", f"{tmp_path}/void.jsonl=1", "--vocab-size", "280"]
    assert main([*words, "--out", str(tmp_path / "other.json")]) == 2
    assert "void.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "other.json").exists()


@pytest.mark.parametrize("skip_bad", [0, 1])
def test_what_is_not_read_ends_the_training_unless_allowed(tmp_path: Path, capsys, skip_bad: int) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"alpha{n}" for n in range(400)))
    (tmp_path / "image.png").write_bytes(b"\0")
    out = tmp_path / "made.json"
    words = ["data", "tokenizer", str(tmp_path), "--out", str(out), "--vocab-size", "270"]
    assert main([*words, "--skip-bad", str(skip_bad)]) == (0 if skip_bad else 2)
    assert out.exists() is bool(skip_bad)
    assert "image.png is of an unknown binary kind" in "".join(capsys.readouterr())
