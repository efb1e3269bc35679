"""Masked tokens from the spans of a record to the weights of targets, against walks over tokens and documents."""

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steptron.cli.main import main
from steptron.config.schema import DataConfig, LimitsConfig, SourceConfig
from steptron.data import parts
from steptron.data.evaluation import EvaluationText, check_not_trained, evaluation_rows, num_rows
from steptron.data.fields import Fields, parse_metadata
from steptron.data.loader import Loader
from steptron.data.masks import MaskWriter, ShardMasks, masked_tokens
from steptron.data.source import ShardedSource, read_info
from steptron.data.tokenize import BuildRequest, Built, build, build_parts
from steptron.errors import DataError
from steptron.model.heads import TokenLoss
from steptron.model.init import initialise
from steptron.model.inputs import Inputs
from steptron.model.transformer import Transformer, apply_stage
from steptron.train.batch import unmasked_by_source
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tiny import tiny_model, tiny_stage


@given(
    lengths=st.lists(st.integers(0, 4), max_size=12),
    borders=st.lists(st.integers(0, 30), max_size=8, unique=True).map(sorted),
)
def test_a_token_is_masked_if_it_has_a_character_of_a_span(lengths: list[int], borders: list[int]) -> None:
    ends = np.cumsum([0, *lengths]).tolist()
    text = "aä東𝄞" * 9
    spans = list(zip(borders[::2], borders[1::2], strict=False))
    hidden = {place for start, stop in spans for place in range(start, stop)}
    tokens, num_bytes = masked_tokens(text, pairwise(ends), spans)
    expected = [any(place in hidden for place in range(start, stop)) for start, stop in pairwise(ends)]
    covered = hidden | {place for n, one in enumerate(expected) if one for place in range(ends[n], ends[n + 1])}
    wide = [start < stop for start, stop in pairwise(ends)]  # a token without a character is masked inside of a span
    assert [one for one, is_wide in zip(tokens.tolist(), wide, strict=True) if is_wide] == [
        one for one, is_wide in zip(expected, wide, strict=True) if is_wide
    ]
    assert num_bytes == sum(len(text[place].encode()) for place in covered)


DOCUMENTS = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.booleans(), min_size=1, max_size=9)), min_size=1, max_size=20
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=DOCUMENTS, start=st.integers(0, 60), length=st.integers(1, 80))
def test_any_range_of_a_shard_has_the_weights_of_its_documents(tmp_path, documents, start: int, length: int) -> None:
    writer, expected = MaskWriter(), []
    for prefix, masked in documents:
        writer.add_document(len(expected), prefix, np.array([False] * prefix + masked))
        expected += [0.25] * prefix + [0.0 if one else 1.0 for one in masked]
    path = tmp_path / "shard.masks"
    path.unlink(missing_ok=True)
    writer.finish(path)
    assert path.exists() == (min(expected) < 1)
    assert (writer.num_prefix_tokens, writer.num_masked_tokens) == (expected.count(0.25), expected.count(0.0))
    start = min(start, len(expected) - 1)
    stop = min(start + length, len(expected))
    if path.exists():
        assert ShardMasks(path, len(expected)).weights(start, stop, 0.25).tolist() == expected[start:stop]


DAMAGE = {
    "cut": lambda data: data[:-4],
    "another file": lambda data: b"MMIDIDX\0" + data[8:],
    "empty": lambda data: b"",
    "behind the shard": lambda data: data[:-8] + (10**6).to_bytes(8, "little"),
    "falling": lambda data: data[:24] + (9).to_bytes(8, "little") + (2).to_bytes(8, "little") + data[40:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_of_masks_is_named(tmp_path: Path, damage) -> None:
    writer = MaskWriter()
    for start in (0, 8):
        writer.add_document(start, 2, np.array([False] * 4 + [True] * 4))
    writer.finish(tmp_path / "a.masks")
    (tmp_path / "a.masks").write_bytes(damage((tmp_path / "a.masks").read_bytes()))
    with pytest.raises(DataError, match=r"^\S+a\.masks is damaged: .*copy it again or build it again$"):
        ShardMasks(tmp_path / "a.masks", 16).weights(0, 16, 0.0)


WORDS = "the fox sees a slow dog under the house and runs over naïve 東京 streets".split()


def record(number: int) -> dict:
    """Text whose first words are masked, and in some records also the last ones, up to the end of the text."""
    rng = np.random.default_rng(int(np.random.default_rng(number).integers(45)))  # many have copies, at any place
    text = " ".join(rng.choice(WORDS, rng.integers(4, 30)).tolist())
    spans = [[0, int(rng.integers(1, 9))]] if number % 3 else []
    if number % 4 == 0:
        spans.append([len(text) - 4, len(text)])
    return {"body": text, "kind": ["story", "code"][number % 2], "spans": spans}


RECORDS = [record(number) for number in range(90)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = (record["body"] for record in RECORDS)
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=330, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture
def request_(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> BuildRequest:
    monkeypatch.setattr(parts, "_SMALLEST_PART", 100)
    for part in range(5):
        lines = [json.dumps(record) for record in RECORDS[part::5]]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    return BuildRequest(
        specs=(str(tmp_path / "*.jsonl"),),
        out=tmp_path / "out",
        name="marked",
        tokenizer=tokenizer,
        vocab_size=None,
        default_vocab_size=330,
        eos=None,
        fields=Fields("body", parse_metadata(["kind", "domain=tales"]), "spans"),
        skip_bad=0,
        workers=1,
    )


class Silent:
    def begin(self, task: str, num_bytes: int) -> None: ...

    def advance(self, num_bytes: int) -> None: ...


@dataclass
class Naive:
    """A document by the tokenizer's plain calls, and by its characters."""

    ids: list[int]
    trained: list[float]
    """Weights while metadata are trained."""
    later: list[float]
    num_bytes: int

    @classmethod
    def of(cls, record: dict, tokenizer: Tokenizer) -> "Naive":
        text = record["body"]
        prefix = tokenizer.encode(f"kind: {record['kind']} | domain: tales\n").ids
        found = tokenizer.encode(text)
        hidden = {place for start, stop in record["spans"] for place in range(start, stop)}
        weights = [0.0 if hidden & set(range(start, stop)) else 1.0 for start, stop in found.offsets]
        for weight, (start, stop) in zip(weights, found.offsets, strict=True):
            hidden |= set() if weight else set(range(start, stop))
        weights += weights[-1:]  # the end, id 0
        rest = "".join(character for place, character in enumerate(text) if place not in hidden)
        ids = [*prefix, *found.ids, 0]
        return cls(ids, [1.0] * len(prefix) + weights, [0.0] * len(prefix) + weights, len(rest.encode()))


def compare(built: Built, tokenizer: Path, records: list[dict]) -> None:
    """Compare a source with records, in order, document by document."""
    known, source = Tokenizer.from_file(str(tokenizer)), ShardedSource(built.folder)
    expected = [Naive.of(record, known) for record in records]
    total, info = source.num_tokens, built.info
    assert source.tokens(0, total).tolist() == [token for one in expected for token in one.ids]
    assert source.weights(0, total, 1.0).tolist() == [weight for one in expected for weight in one.trained]
    assert source.weights(0, total, 0.0).tolist() == [weight for one in expected for weight in one.later]
    assert info.num_masked_tokens == sum(one.trained.count(0.0) for one in expected)
    assert info.num_prefix_tokens == sum(one.later.count(0.0) - one.trained.count(0.0) for one in expected)
    assert info.num_text_bytes == sum(one.num_bytes for one in expected)
    assert list(source.verify())


def in_order(records: list[dict]) -> list[dict]:
    """The records as the five files have them."""
    return [one for part in range(5) for one in records[part::5]]


def test_a_build_has_the_weights_of_a_walk_over_documents(request_: BuildRequest, tokenizer: Path) -> None:
    [built] = build(request_, Silent())
    assert len(built.info.shards) > 1
    compare(built, tokenizer, in_order(RECORDS))


def test_masks_stay_with_their_documents_when_copies_are_dropped(request_: BuildRequest, tokenizer: Path) -> None:
    """Also in parts that others build, and joined."""
    request_ = replace(request_, drop_duplicates="exact")
    for index in (1, 0):
        build_parts(replace(request_, workers=1), index, 2, Silent())
    [built] = build(request_, Silent())
    first = {}
    for one in in_order(RECORDS):
        first.setdefault(one["body"], one)
    assert 0 < len(first) < len(RECORDS)
    compare(built, tokenizer, list(first.values()))


def test_the_split_does_not_depend_on_metadata_and_keeps_the_masks(request_: BuildRequest, tokenizer: Path) -> None:
    sides = build(replace(request_, hold_out=0.4), Silent())
    plain = build(replace(request_, hold_out=0.4, out=request_.out / "plain", fields=Fields("body")), Silent())
    for ours, theirs in zip(sides, plain, strict=True):
        assert ours.info.num_documents == theirs.info.num_documents > 0
        assert ours.info.inputs == theirs.info.inputs, "an evaluation on one of a run on the other is refused"
        assert ours.info.origin != theirs.info.origin
        texts = {document.strip() for document in read_texts(theirs, tokenizer)}
        compare(ours, tokenizer, [record for record in in_order(RECORDS) if record["body"] in texts])
    assert not plain[0].info.num_prefix_tokens
    assert not list(plain[0].folder.glob("*.masks"))


def read_texts(built: Built, tokenizer: Path) -> list[str]:
    known, source = Tokenizer.from_file(str(tokenizer)), ShardedSource(built.folder)
    return [known.decode(source.document(number)[:-1].tolist()) for number in range(source.num_documents)]


def mark(ids: list[int]) -> tuple[int, np.ndarray]:
    """Two tokens of metadata; of the others, every third is masked."""
    return 2, np.array([place >= 2 and token % 3 == 0 for place, token in enumerate(ids)])


SHARDS = [[list(range(1, 12)), list(range(12, 15))], [list(range(15, 49))]]
HIDDEN = {1, 2, 12, 13, 15, 16} | {token for token in range(1, 49) if token % 3 == 0}
"""The tokens that are metadata or masked. Every token is another one."""


def test_an_evaluation_has_neither_metadata_nor_masked_tokens_as_targets(write_source) -> None:
    source = ShardedSource(write_source("marked", SHARDS, mark=mark, num_text_bytes=62))
    firsts, targets = {1, 12, 15}, set()
    for index in range(num_rows(source, 48, 7)):
        ids, weights = evaluation_rows(source, 48, 7, 1, [index]).targets(7, head=0)
        targets |= set(ids[weights > 0].tolist())
    assert targets == set(range(1, 49)) - HIDDEN - firsts
    assert EvaluationText.of_source(source).bytes_per_token == 62 / (48 - len(HIDDEN))


def test_masks_are_part_of_what_is_trained_on_and_not_of_what_is_a_copy(write_source) -> None:
    marked, plain = (ShardedSource(write_source(name, SHARDS, mark=one)) for name, one in (("m", mark), ("p", None)))
    assert marked.info.identity != plain.info.identity
    with pytest.raises(DataError, match=r"has the same tokens as data\.sources\.plain, which is trained on"):
        check_not_trained("held", marked, {"plain": plain})


def batch_of(folder: Path, tokenizer_file: Path, rows: int):
    sources = {"text": SourceConfig(path=str(folder))}
    data = DataConfig(sources=sources, tokenizer=str(tokenizer_file), metadata_until=0)
    return Loader(data, {"base": tiny_stage(seq_len=16)}, 1, num_mtp_heads=2, vocab_size=50).batch("base", range(rows))


def test_gradients_do_not_see_masked_targets(write_source, tokenizer_file: Path) -> None:
    batch = batch_of(write_source("marked", SHARDS, 50, mark=mark), tokenizer_file, 3)
    rows = batch.rows
    walked = [
        (ids[place], ids[place + 1]) for ids in rows.tokens_BS.tolist() for place in range(16)
    ]  # a token and the next one; those of one document differ by 1, and 12 and 15 begin documents
    trained = [pair for pair in walked if pair[1] == pair[0] + 1 and pair[1] not in HIDDEN | {12, 15}]
    assert unmasked_by_source([batch], 16, ["text"]) == [len(trained)], "as the ledger counts"
    hidden_HBT = torch.isin(torch.stack([rows.targets(16, head)[0] for head in range(3)]), torch.tensor([*HIDDEN]))
    inputs = Inputs.from_rows(rows, 16)
    assert 0 < int((inputs.weights_HBT > 0).sum()) < inputs.weights_HBT.numel()
    assert not inputs.weights_HBT[hidden_HBT].any()
    model = Transformer(tiny_model(num_layers=2, layer_pattern="FS"))
    initialise(model, 3, 0.1)
    apply_stage(model, tiny_stage(limits=LimitsConfig()), num_groups=1)

    def gradients(changed_HBT: torch.Tensor) -> list[torch.Tensor]:
        other = replace(inputs, targets_HBT=torch.where(changed_HBT, 7, inputs.targets_HBT))
        model.zero_grad()
        TokenLoss()(model, model(inputs=other), other).heads_H.sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    first = gradients(torch.zeros_like(hidden_HBT))
    assert all(map(torch.equal, first, gradients(hidden_HBT)))
    assert not all(map(torch.equal, first, gradients(inputs.weights_HBT > 0)))


def test_a_source_that_is_masked_all_over_gives_no_target(write_source, tokenizer_file: Path) -> None:
    """The run ends at such a batch (tests/train/test_train_weights.py)."""
    folder = write_source("masked", SHARDS, 50, mark=lambda ids: (1, np.array([False] + [True] * (len(ids) - 1))))
    assert not batch_of(folder, tokenizer_file, 6).rows.sum_weights(16).any()


def test_inspect_and_verify_show_metadata_and_masked_text(request_: BuildRequest, tokenizer: Path, capsys) -> None:
    words = ["data", "build", request_.specs[0], "--out", request_.out, "--name", "marked", "--tokenizer", tokenizer]
    words += ["--text-field", "body", "--metadata", "kind", "--metadata", "domain=tales", "--mask-field", "spans"]
    assert main([*map(str, words), "--workers", "1"]) == 0
    assert main(["data", "inspect", str(request_.out), "--samples", "2"]) == 0
    shown, info = capsys.readouterr().out, read_info(request_.out / "marked")
    assert f"{info.num_prefix_tokens:,} tokens ({info.num_prefix_tokens / info.num_tokens:.1%}) are metadata" in shown
    assert f"{info.num_masked_tokens:,} tokens ({info.num_masked_tokens / info.num_tokens:.1%}) are masked" in shown
    assert "tokens: metadata 'kind: story | domain: tales\\n' " in shown
    number = next(n for n, record in enumerate(in_order(RECORDS)) if n == 45)
    record = in_order(RECORDS)[number]
    line = next(line for line in shown.splitlines() if line.startswith("  document 45 of"))
    assert f"masked '{record['body'][: record['spans'][0][1]]}" in line
    assert main(["data", "verify", str(request_.out)]) == 0
    assert f"marked: {3 * len(info.shards)} files, checksums match" in capsys.readouterr().out
    path = request_.out / "marked" / "shard-00000.masks"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert main(["data", "verify", str(request_.out)]) == 2
    assert "shard-00000.masks is damaged (checksum mismatch)" in capsys.readouterr().err
