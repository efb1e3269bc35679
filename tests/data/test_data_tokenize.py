import errno
import fcntl
import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from steptron.data import parts
from steptron.data.fields import PLAIN, Fields
from steptron.data.source import ShardedSource, read_info
from steptron.data.tokenize import BuildRequest, build, build_parts
from steptron.data.tokenizer import load, tokenizer_hash
from steptron.errors import DataError
from tokenizers import Tokenizer

WORDS = (
    "the model learns a long text of many words and numbers 12 345 über naïve 東京 def return\n\t  <|endoftext|>".split(
        " "
    )
)


class Silent:
    """A progress that adds up."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.done: dict[str, int] = {}

    def begin(self, task: str, num_bytes: int) -> None:
        self.task = task
        self.totals[task], self.done[task] = num_bytes, 0

    def advance(self, num_bytes: int) -> None:
        self.done[self.task] += num_bytes


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(1, 90))) for _ in range(count)]


@pytest.fixture
def request_(tmp_path: Path) -> BuildRequest:
    (tmp_path / "in").mkdir()
    for index, text in enumerate(texts(40)):
        (tmp_path / "in" / f"{index}.txt").write_text(text)
    (tmp_path / "in" / "nothing.txt").write_text("")
    return BuildRequest(
        specs=(str(tmp_path / "in"),),
        out=tmp_path / "out",
        name="words",
        tokenizer=None,
        vocab_size=None,
        default_vocab_size=300,
        eos=None,
        fields=PLAIN,
        skip_bad=1,
        workers=1,
    )


def documents(folder: Path, tokenizer_path: Path) -> list[str]:
    """The texts of a source, by way of the plain ids, an EOS after each."""
    tokenizer, info = Tokenizer.from_file(str(tokenizer_path)), read_info(folder)
    ids = [
        int(token) for shard in info.shards for token in np.fromfile(folder / f"{shard.name}.bin", np.uint16).tolist()
    ]
    found, document = [], []
    for token in ids:
        if token == info.eos_id:
            found.append(tokenizer.decode(document, skip_special_tokens=False))
            document = []
        else:
            document.append(token)
    assert not document, "the stream ends with EOS"
    return found


def test_every_text_comes_back_once_with_eos_behind_it(request_: BuildRequest) -> None:
    progress = Silent()
    [(folder, info, is_new)] = build(request_, progress)
    assert (folder, is_new) == (request_.out / "words", True)
    assert sorted(documents(folder, request_.out / "tokenizer.json")) == sorted(texts(40))
    assert info.num_documents == 40
    assert info.num_text_bytes == sum(len(text.encode()) for text in texts(40))
    assert info.vocab_size == 300 > info.max_token_id
    assert info.tokenizer_hash == tokenizer_hash(request_.out / "tokenizer.json")
    assert list(ShardedSource(folder).verify())
    assert progress.done == progress.totals
    assert sorted(path.name for path in request_.out.iterdir()) == [".lock", "tokenizer.json", "words"]


@pytest.mark.parametrize("number", range(6))
def test_no_text_of_a_part_is_left_behind(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Texts are encoded a few at a time; what is left at the end may be one text, or none."""
    monkeypatch.setattr(parts, "_ENCODED_AT_ONCE", 8)
    texts = [f"{n}123" for n in range(number)]  # two fill a batch
    batches = list(parts._batches(texts))
    assert [text for batch in batches for text in batch] == texts
    assert [len(batch) for batch in batches] == [2] * (number // 2) + [1] * (number % 2)


def test_any_number_of_processes_writes_the_same_bytes(request_: BuildRequest, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parts, "_SMALLEST_PART", 1)
    progress = Silent()
    [one] = build(request_, progress)
    [two] = build(replace(request_, out=tmp_path / "two", workers=2), progress)
    assert len(one.info.shards) > 5
    assert one.info == two.info
    for path in one.folder.iterdir():
        assert path.read_bytes() == (two.folder / path.name).read_bytes()
    assert progress.done == progress.totals


def test_a_second_build_keeps_what_is_there(request_: BuildRequest) -> None:
    [first] = build(request_, Silent())
    before = {path: path.stat().st_mtime_ns for path in request_.out.rglob("*") if path.name != ".lock"}
    [second] = build(request_, Silent())
    assert (second.info, second.is_new) == (first.info, False)
    assert {path: path.stat().st_mtime_ns for path in request_.out.rglob("*") if path.name != ".lock"} == before


def test_other_text_does_not_replace_a_source(request_: BuildRequest) -> None:
    [first] = build(request_, Silent())
    (Path(request_.specs[0]) / "0.txt").write_text("changed")
    with pytest.raises(
        DataError, match="words was built from other text or by other rules: remove it to build it again"
    ):
        build(request_, Silent())
    assert list(ShardedSource(first.folder).verify())


def test_a_folder_that_is_no_source_is_left_alone(request_: BuildRequest) -> None:
    (request_.out / "words").mkdir(parents=True)
    (request_.out / "words" / "notes").write_text("mine")
    with pytest.raises(DataError, match="words exists and is not a source: give another --name or --out"):
        build(request_, Silent())
    assert (request_.out / "words" / "notes").read_text() == "mine"


def test_a_damaged_source_is_not_taken_for_a_finished_one(request_: BuildRequest) -> None:
    [built] = build(request_, Silent())
    (built.folder / "shard-00000.bin").unlink()
    with pytest.raises(DataError, match=r"shard-00000\.bin is missing, .* remove .*words and run `steptron data build"):
        build(request_, Silent())


def test_a_second_source_shares_the_tokenizer_of_the_folder(request_: BuildRequest, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts(9, seed=1)))
    build(request_, Silent())
    more = replace(request_, specs=(str(tmp_path / "more.jsonl"),), name="more", fields=Fields("body"))
    build(more, Silent())
    assert documents(request_.out / "more", request_.out / "tokenizer.json") == texts(9, seed=1)
    with pytest.raises(DataError, match=r"--vocab-size=400: .*tokenizer\.json has 300 tokens and is kept"):
        build(replace(more, vocab_size=400), Silent())


def test_a_given_tokenizer_is_used_and_another_one_refused(request_: BuildRequest, tmp_path: Path) -> None:
    build(request_, Silent())
    given = request_.out / "tokenizer.json"
    other = replace(request_, out=tmp_path / "other", tokenizer=given)
    [built] = build(other, Silent())
    assert built.info.tokenizer_hash == tokenizer_hash(given) == tokenizer_hash(tmp_path / "other" / "tokenizer.json")
    build(replace(request_, out=tmp_path / "larger", vocab_size=310), Silent())
    with pytest.raises(DataError, match=r"other/tokenizer\.json is not --tokenizer .*larger/tokenizer\.json"):
        build(replace(other, tokenizer=tmp_path / "larger" / "tokenizer.json"), Silent())


def test_eos_is_found_or_named(request_: BuildRequest, tmp_path: Path) -> None:
    build(request_, Silent())
    contents = (request_.out / "tokenizer.json").read_text()
    renamed = tmp_path / "renamed.json"
    renamed.write_text(contents.replace("<|endoftext|>", "[FIN]"))
    with pytest.raises(DataError, match=r"renamed\.json has no token .*: name its end-of-text token with --eos"):
        load(renamed)
    assert load(renamed, "[FIN]").eos_id == load(request_.out / "tokenizer.json").eos_id == 0


@pytest.mark.parametrize("given", [False, True], ids=["new tokenizer", "given tokenizer"])
def test_an_empty_source_is_refused_and_leaves_nothing(request_: BuildRequest, tmp_path: Path, given: bool) -> None:
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "a.txt").write_text("")
    build(request_, Silent())
    empty = replace(request_, specs=(str(tmp_path / "void"),), out=tmp_path / "out2")
    if given:
        empty = replace(empty, tokenizer=request_.out / "tokenizer.json")
    with pytest.raises(DataError, match="void: not one document with text there"):
        build(empty, Silent())
    assert {path.name for path in empty.out.iterdir()} <= {".lock", "tokenizer.json"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_document_ends_the_build_in_one_line_and_leaves_no_source(request_, monkeypatch, workers: int) -> None:
    monkeypatch.setattr(parts, "_SMALLEST_PART", 500)
    build(request_, Silent())
    tokenizer = request_.out / "tokenizer.json"
    (Path(request_.specs[0]) / "zz.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"zz\.txt is not UTF-8 at byte 0.*; more than --skip-bad=1") as caught:
        build(replace(request_, name="again", tokenizer=tokenizer, workers=workers), Silent())
    assert "\n" not in str(caught.value)
    assert {path.name for path in request_.out.iterdir()} <= {".lock", "tokenizer.json", "words", ".parts-again"}


VOCABULARY = {
    "below the bytes": (200, "--vocab-size=200 is too small: 256 bytes and <|endoftext|> need at least 257"),
    "above the text": (50_000, r"--vocab-size=50000: the text gives no more than \d+ tokens: ask for \d+ or less"),
}


@pytest.mark.parametrize(("vocab_size", "message"), VOCABULARY.values(), ids=VOCABULARY.keys())
def test_a_vocabulary_that_cannot_be_had_is_refused(request_: BuildRequest, vocab_size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build(replace(request_, vocab_size=vocab_size), Silent())
    assert not (request_.out / "tokenizer.json").exists()


def test_two_builds_do_not_write_into_one_folder(request_: BuildRequest) -> None:
    request_.out.mkdir()
    with (request_.out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another build is writing into .*out: wait for it"):
            build(request_, Silent())


def test_what_a_killed_build_left_is_cleared_away(request_: BuildRequest) -> None:
    (request_.out / ".tmp-words").mkdir(parents=True)
    (request_.out / ".tmp-words" / "shard-00099.bin").write_bytes(b"half")
    [built] = build(request_, Silent())
    assert "shard-00099.bin" not in {path.name for path in built.folder.iterdir()}
    assert not (request_.out / ".tmp-words").exists()


def test_a_disk_that_is_full_is_told_in_one_line(request_: BuildRequest, monkeypatch) -> None:
    def full(prefix: Path, *counts: int) -> None:
        raise OSError(28, "No space left on device", str(prefix))

    monkeypatch.setattr(parts, "describe_shard", full)
    with pytest.raises(
        DataError, match=r"out: the build stopped, .*No space left on device.*nothing unfinished was kept"
    ):
        build(request_, Silent())
    assert sorted(path.name for path in request_.out.iterdir()) == [".lock", "tokenizer.json"]


def test_what_is_not_read_is_counted_listed_and_ends_the_build_unless_allowed(request_: BuildRequest) -> None:
    (Path(request_.specs[0]) / "image.png").write_bytes(b"\x89PNG\0")
    lines = ['{"text": "good"}', '{"text": null}', '{"text": "cut off', '{"text": "good too"}']
    (Path(request_.specs[0]) / "web.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"2 inputs are not read, the first: .*image\.png is .*--skip-bad N"):
        build(replace(request_, skip_bad=0), Silent())
    with pytest.raises(DataError, match=r"web\.jsonl, line 2: the field 'text' must be text.*more than --skip-bad=3"):
        build(replace(request_, skip_bad=3), Silent())
    [built] = build(replace(request_, skip_bad=4), Silent())
    assert built.info.num_documents == 42
    assert read_info(built.folder).unread == built.info.unread
    assert [Path(unread.place).name for unread in built.info.unread] == [
        "image.png",
        "nothing.txt",
        "web.jsonl, line 2:",
        "web.jsonl, line 3:",
    ]
    assert json.loads((built.folder / "source.json").read_text())["unread"][3]["reason"].startswith("not JSON")
    with pytest.raises(DataError, match="4 inputs are not read"):
        build(replace(request_, skip_bad=3), Silent())  # nor is a finished source accepted then


@pytest.mark.parametrize("workers", [1, 2])
def test_finished_work_of_other_files_is_kept(
    request_: BuildRequest, monkeypatch, tmp_path: Path, workers: int
) -> None:
    monkeypatch.setattr(parts, "_SMALLEST_PART", 500)
    lines = [json.dumps({"text": text}) for text in texts(30)]
    (Path(request_.specs[0]) / "zz.jsonl").write_text("\n".join([*lines, '{"text": "cut off']))
    build(replace(request_, out=tmp_path / "first", skip_bad=2), Silent())
    other = replace(request_, tokenizer=tmp_path / "first" / "tokenizer.json", workers=workers)
    with pytest.raises(DataError, match="line 31"):
        build(other, Silent())
    kept = {path.stem for path in (other.out / ".parts-words").glob("*.json")}
    assert kept
    written = []
    write_shard = parts._write_shard
    monkeypatch.setattr(
        parts, "_write_shard", lambda *task: (written.append(task[1].name.split(".")[1]), write_shard(*task))[1]
    )
    damaged = other.out / ".parts-words" / f"{min(kept)}.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    [built] = build(replace(other, skip_bad=2, workers=1), Silent())
    assert min(kept) in written
    assert not (kept - {min(kept)}) & set(written)
    [whole] = [read_info(tmp_path / "first" / "words")]
    assert built.info == whole
    assert list(ShardedSource(built.folder).verify())
    assert not (other.out / ".parts-words").exists()


def test_shards_built_apart_are_joined_to_the_same_source(request_: BuildRequest, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parts, "_SMALLEST_PART", 500)
    [alone] = build(request_, Silent())
    apart = replace(request_, out=tmp_path / "apart", tokenizer=request_.out / "tokenizer.json")
    progress = Silent()
    built = [build_parts(apart, index, 3, progress)[0] for index in (2, 0, 1, 0)]
    assert sum(part.num_built for part in built[:-1]) == built[0].num_parts == len(alone.info.shards)
    assert progress.done == progress.totals
    assert not (apart.out / "words").exists()
    monkeypatch.setattr(parts, "_write_shard", None)  # nothing is left to do
    [joined] = build(apart, Silent())
    assert joined.info == alone.info
    for path in alone.folder.iterdir():
        assert path.read_bytes() == (joined.folder / path.name).read_bytes()
    assert sorted(path.name for path in apart.out.iterdir()) == [".lock", "tokenizer.json", "words"]
    assert build_parts(apart, 0, 1, Silent())[0].num_built == 0


def test_a_shard_needs_a_tokenizer_and_no_build_beside_it(request_: BuildRequest) -> None:
    with pytest.raises(DataError, match=r"--shard=0/2: there is no .*tokenizer\.json"):
        build_parts(request_, 0, 2, Silent())
    build(replace(request_, name="other"), Silent())
    with (request_.out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert build_parts(request_, 0, 2, Silent())
        with pytest.raises(DataError, match="another build is writing"):
            build(request_, Silent())
    with (request_.out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another build is writing"):
            build_parts(request_, 1, 2, Silent())


def tokens_of(tmp_path: Path, special: list[str], ordinary: list[str]) -> Path:
    tokenizer = Tokenizer.from_str(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(ordinary)
    tokenizer.save(str(tmp_path / "tokens.json"))
    return tmp_path / "tokens.json"


@pytest.mark.parametrize("eos", ["<|endoftext|>", "</s>", "<eos>", "<|eos|>"])
def test_the_one_special_token_ends_a_document_whatever_ordinary_ones_there_are(tmp_path: Path, eos: str) -> None:
    others = [name for name in ("<|endoftext|>", "</s>", "<eos>") if name != eos]
    used = load(tokens_of(tmp_path, [eos], others))
    assert used.eos == eos == used.tokenizer.id_to_token(used.eos_id)


@pytest.mark.parametrize(("special", "ordinary"), [(["</s>", "<eos>"], []), ([], ["</s>"]), ([], ["</s>", "<eos>"])])
def test_an_uncertain_end_of_document_is_asked_for(tmp_path: Path, special: list[str], ordinary: list[str]) -> None:
    path = tokens_of(tmp_path, special, ordinary)
    with pytest.raises(DataError, match="name one with --eos; there are </s> ") as caught:
        load(path)
    assert all(f"{name} (special)" in str(caught.value) for name in special)
    assert all(f"{name} (ordinary)" in str(caught.value) for name in ordinary)
    assert load(path, "</s>").eos == "</s>"


def test_a_long_tmpdir_and_two_processes(request_: BuildRequest, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parts, "_SMALLEST_PART", 500)
    folder = tmp_path / ("t" * 95)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    [built] = build(replace(request_, workers=2), Silent())
    assert len(built.info.shards) > 1


def test_a_file_system_without_locks_is_told(request_: BuildRequest, monkeypatch) -> None:
    def no_locks(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(DataError, match=r"out is on a file system without locks .*give another --out"):
        build(request_, Silent())
