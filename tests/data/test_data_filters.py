import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from steptron.data import filters, parts
from steptron.data.duplicates import first_copies
from steptron.data.fields import PLAIN
from steptron.data.filters import has_repeats, signature
from steptron.data.source import ShardedSource
from steptron.data.tokenize import BuildRequest, build, build_parts
from steptron.errors import DataError
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [f"w{n}" for n in range(200)]


class Silent:
    def begin(self, task: str, num_bytes: int) -> None: ...
    def advance(self, num_bytes: int) -> None: ...


def repeats_plainly(ids: list[int]) -> bool:
    """Every n-gram at every place, one repetition at a time."""
    for period in range(1, 14):
        for start in range(len(ids)):
            gram, times = ids[start : start + period], 1
            while len(gram) == period and ids[start + times * period : start + (times + 1) * period] == gram:
                times += 1
            if times >= 32:
                return True
    return False


@given(
    gram=st.lists(st.integers(0, 2), min_size=1, max_size=14),
    times=st.integers(30, 33),
    before=st.lists(st.integers(0, 2), max_size=5),
    after=st.lists(st.integers(0, 2), max_size=5),
)
def test_repeats_are_those_of_a_plain_search(gram: list[int], times: int, before: list[int], after: list[int]) -> None:
    ids = before + gram * times + after
    assert has_repeats(np.array(ids)) is repeats_plainly(ids)


def test_short_and_empty_documents_have_no_repeats() -> None:
    assert not has_repeats(np.array([], dtype=np.int64))
    assert not has_repeats(np.array([7] * 31))
    assert has_repeats(np.array([7] * 32))


def connected_plainly(rows: list[list[int]]) -> list[int]:
    """The smallest document of each connected group, by merging two groups at a time."""
    group = list(range(len(rows)))
    for a in range(len(rows)):
        for b in range(a):
            if any(x == y for x, y in zip(rows[a], rows[b], strict=True)):
                old, new = max(group[a], group[b]), min(group[a], group[b])
                group = [new if number == old else number for number in group]
    return group


@given(rows=st.lists(st.lists(st.integers(0, 12), min_size=3, max_size=3), max_size=14), cut=st.integers(0, 14))
def test_copies_are_connected_groups(rows: list[list[int]], cut: int) -> None:
    table = np.array(rows, dtype=np.uint64).reshape(-1, 3)
    assert first_copies([table[:cut], table[cut:]]).tolist() == connected_plainly(rows)


def edited(words: list[str], share: float, rng: random.Random) -> list[str]:
    """The words with runs of them replaced, so that about `share` of the shingles stays."""
    words = list(words)
    for place in rng.sample(range(0, len(words) - 5, 5), round((1 - share) * len(words) / 10)):
        words[place : place + 5] = [f"new{rng.random()}" for _ in range(5)]
    return words


def test_similar_texts_share_a_mark_and_others_do_not() -> None:
    rng = random.Random(0)
    found = dict.fromkeys((0.95, 0.3), 0)
    for _ in range(20):
        words = [rng.choice(WORDS) for _ in range(300)]
        marks = signature(" ".join(words), "near")
        assert (signature(" ".join(words).upper() + "!", "near") == marks).all()
        for share in found:
            found[share] += (signature(" ".join(edited(words, share, rng)), "near") == marks).any()
    assert found[0.95] == 20
    assert found[0.3] == 0
    assert (signature("漢字かな交じり文の文書です", "near") == signature("漢字かな交じり文の文書です。", "near")).all()
    assert (signature("a b", "exact") != signature("a b ", "exact")).all()
    assert len(signature("", "near")) == filters.KINDS["near"]


@pytest.fixture
def request_(tmp_path: Path, monkeypatch) -> BuildRequest:
    """Six parts of documents, with copies across parts and documents that repeat themselves."""
    rng = random.Random(1)
    long = [[rng.choice(WORDS) for _ in range(120)] for _ in range(30)]
    texts = [" ".join(words) for words in long]
    texts += [texts[3], texts[3], texts[17], " ".join(edited(long[5], 0.95, rng)), "ha " * 40, "no no yes " * 31]
    (tmp_path / "in").mkdir()
    for number in range(6):
        lines = [json.dumps({"text": text}) for text in texts[number::6]]
        (tmp_path / "in" / f"{number}.jsonl").write_text("\n".join(lines))
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["?", *WORDS, "<eos>"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "tokens.json"))
    monkeypatch.setattr(parts, "_SMALLEST_PART", 100)
    return BuildRequest(
        specs=(str(tmp_path / "in"),),
        out=tmp_path / "out",
        name="words",
        tokenizer=tmp_path / "tokens.json",
        vocab_size=None,
        default_vocab_size=300,
        eos=None,
        fields=PLAIN,
        skip_bad=0,
        workers=1,
    )


def documents(folder: Path) -> list[tuple[int, ...]]:
    source = ShardedSource(folder)
    return [tuple(source.document(number).tolist()) for number in range(source.info.num_documents)]


CASES = {
    "nothing": ({}, 36, {}),
    "repeats": ({"drop_repeats": True}, 34, {"repeats": 2}),
    "exact": ({"drop_duplicates": "exact"}, 33, {"exact duplicates": 3}),
    "near": ({"drop_duplicates": "near"}, 32, {"near duplicates": 4}),
    "both": ({"drop_repeats": True, "drop_duplicates": "near"}, 30, {"repeats": 2, "near duplicates": 4}),
}


@pytest.mark.parametrize(("options", "num_kept", "dropped"), CASES.values(), ids=CASES.keys())
def test_what_is_dropped_is_counted_and_listed_and_the_first_copy_stays(
    request_: BuildRequest, tmp_path: Path, options: dict, num_kept: int, dropped: dict
) -> None:
    [every] = build(request_, Silent())
    [built] = build(replace(request_, out=tmp_path / "filtered", **options), Silent())
    info = built.info
    assert (info.num_documents, dict(info.dropped)) == (num_kept, dropped)
    before, after = documents(every.folder), documents(built.folder)
    if "drop_duplicates" in options:
        assert after == [document for document in dict.fromkeys(before) if document in after], "the first copies stay"
    else:
        assert after == [document for document in before if document in after]
    assert info.num_tokens == sum(map(len, after))
    assert info.max_token_id == max(map(max, after))
    assert list(ShardedSource(built.folder).verify())
    listed = [json.loads(line) for line in (built.folder / "dropped.jsonl").read_text().splitlines()] if dropped else []
    reasons = [line["reason"] for line in listed]
    assert len(reasons) == sum(dropped.values())
    assert reasons.count("repeats") == dropped.get("repeats", 0)
    assert all(line["text"] for line in listed)
    assert (info.num_text_bytes < every.info.num_text_bytes) is bool(options)


def test_filters_do_not_depend_on_processes_or_shards(request_: BuildRequest, tmp_path: Path) -> None:
    request_ = replace(request_, drop_repeats=True, drop_duplicates="near")
    [alone] = build(request_, Silent())
    other = replace(request_, out=tmp_path / "other")
    for index in (2, 0, 1):
        build_parts(other, index, 3, Silent())
    [joined] = build(other, Silent())
    assert joined.info == alone.info
    for path in alone.folder.iterdir():
        assert path.read_bytes() == (joined.folder / path.name).read_bytes()
    assert sorted(path.name for path in other.out.iterdir()) == [".lock", "tokenizer.json", "words"]
    with pytest.raises(DataError, match="was built from other text or by other rules"):
        build(replace(other, drop_repeats=False), Silent())


def test_near_duplicates_without_the_library_are_refused(request_: BuildRequest, monkeypatch) -> None:
    monkeypatch.setattr(filters, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs datasketch: pip install 'steptron\[dedup\]'"):
        build(replace(request_, drop_duplicates="near"), Silent())
