"""The split by the hash of a text: what is on which side, what `source.json` says of it, and that nothing held out is
trained on."""

import json
import random
import re
from pathlib import Path

import pytest
from steptron.cli.main import main
from steptron.config.schema import DataConfig, LrConfig, SourceConfig, StageConfig
from steptron.data.hold_out import is_held_out
from steptron.data.loader import Loader
from steptron.data.source import ShardedSource, read_info
from tokenizers import Tokenizer

SHARE = 0.2
TEXTS = [f"document number {n} says {n} times that it is number {n}." for n in range(300)]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def build(path: Path, out: Path, *options: object) -> int:
    words = ["data", "build", path, "--out", out, "--workers", 1, "--vocab-size", 300, *options]
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The --out folder of TEXTS, a copy of each third among them, with the sources `numbers` and `numbers-held-out`."""
    folder = tmp_path_factory.mktemp("split")
    path = write_lines(folder / "numbers.jsonl", TEXTS + TEXTS[::3])
    assert build(path, folder / "out", "--hold-out", SHARE) == 0
    return folder / "out"


def numbers(folder: Path, tokens: list[int]) -> set[int]:
    """The documents of which these tokens have a number, whole."""
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens, skip_special_tokens=False)
    return {int(n) for n in re.findall(r"says (\d+) times", text)}


def source_numbers(folder: Path, name: str) -> set[int]:
    source = ShardedSource(folder / name)
    return numbers(folder, source.tokens(0, source.num_tokens).tolist())


def test_sides_follow_the_hash_of_the_text() -> None:
    """The hashes are written here: sources that are built today must be split as those of another version were."""
    assert [n for n, text in enumerate(TEXTS[:40]) if is_held_out(text, SHARE)] == [
        0,
        1,
        3,
        6,
        8,
        12,
        17,
        23,
        26,
        31,
        33,
        37,
        38,
    ]
    random.seed(0)
    draws = [f"{random.random()}" for _ in range(4000)]
    shares = {share: {text for text in draws if is_held_out(text, share)} for share in (0.01, 0.1, 0.5)}
    assert shares[0.01] < shares[0.1] < shares[0.5], "a larger share holds out the same and more"
    for share, held in shares.items():
        assert len(held) == pytest.approx(4000 * share, abs=4 * (4000 * share * (1 - share)) ** 0.5)
    assert not any(is_held_out(text, 0.0) for text in draws)


def test_a_build_puts_each_document_on_one_side_and_records_the_split(built: Path, tmp_path: Path) -> None:
    held = {n for n, text in enumerate(TEXTS) if is_held_out(text, SHARE)}
    assert source_numbers(built, "numbers-held-out") == held
    assert source_numbers(built, "numbers") == set(range(300)) - held
    infos = {name: read_info(built / name) for name in ("numbers", "numbers-held-out")}
    assert sum(info.num_documents for info in infos.values()) == 400
    assert [(info.hold_out, info.held_out) for info in infos.values()] == [(SHARE, False), (SHARE, True)]
    assert infos["numbers"].inputs == infos["numbers-held-out"].inputs != ""
    assert infos["numbers"].origin != infos["numbers-held-out"].origin
    whole = ShardedSource(built / "numbers").tokens(0, infos["numbers"].num_tokens).tolist()
    shuffled = write_lines(tmp_path / "numbers.jsonl", random.Random(1).sample(TEXTS, 300))
    options = ("--hold-out", SHARE, "--tokenizer", built / "tokenizer.json")
    assert build(shuffled, tmp_path / "out", *options) == 0
    assert source_numbers(tmp_path / "out", "numbers-held-out") == held, "the order of the documents does not matter"
    assert numbers(built, whole) == source_numbers(tmp_path / "out", "numbers")


def test_no_training_sample_has_a_held_out_document(built: Path) -> None:
    """All samples of three epochs of two stages, against the held-out texts."""
    held = source_numbers(built, "numbers-held-out")
    tokens = read_info(built / "numbers").num_tokens
    stages = {
        f"stage of {length}": StageConfig(
            tokens=3 * tokens, seq_len=length, batch_size=1, mix={"numbers": 1.0}, lr=LrConfig(peak=1e-3)
        )
        for length in (64, 500)
    }
    data = DataConfig(
        tokenizer=str(built / "tokenizer.json"), sources={"numbers": SourceConfig(path=str(built / "numbers"))}
    )
    loader = Loader(data, stages, seed=3, num_mtp_heads=2, vocab_size=300)
    drawn: set[int] = set()
    for name, stage in stages.items():
        rows = loader.batch(name, range(3 * tokens // stage.seq_len)).rows.tokens_BS.tolist()
        drawn |= set().union(*(numbers(built, row) for row in rows))
    assert len(drawn) > 200, "samples are long enough to show numbers"
    assert drawn.isdisjoint(held)
    assert drawn == set(range(300)) - held


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ("1", "--hold-out=1.0 must be at least 0 and below 1"),
        ("-0.1", "--hold-out=-0.1 must be at least 0 and below 1"),
        ("nan", "--hold-out=nan must be at least 0 and below 1"),
        ("1e-9", "--hold-out=1e-09 leaves one of the two sources without a document"),
    ],
)
def test_a_share_that_makes_no_split_is_one_line(tmp_path: Path, capsys, share: str, message: str) -> None:
    path = write_lines(tmp_path / "numbers.jsonl", TEXTS)
    assert build(path, tmp_path / "out", f"--hold-out={share}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out" / "numbers").exists()
