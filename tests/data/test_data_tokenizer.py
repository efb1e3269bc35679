"""Tokenizers of every type: where they are found, and that text which spells a special token stays text."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from steptron.data.tokenizer import find, load
from steptron.errors import DataError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
TRAINING = ["the river <pad> </s> light over [SEP] green </s></s> fields"] * 20
TEXT = "the river </s> light</s>over <pad> [SEP] <bos> <tool> green"
SPECIAL = ["</s>", "<pad>", "[SEP]", "<bos>"]


def bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TRAINING, trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=ALPHABET))
    return tokenizer


def bpe_with_merges_to_special_tokens() -> Tokenizer:
    """A tokenizer as some converters write it: the special tokens are results of merges, and whole words are taken first."""
    merges = [["<", "/"], ["s", ">"], ["</", "s>"], ["<", "p"], ["a", "d"], ["ad", ">"], ["<p", "ad>"]]
    letters = sorted(set("".join([*TRAINING, TEXT])) - {" "})
    vocab = {piece: n for n, piece in enumerate(dict.fromkeys([*letters, *(a + b for a, b in merges)]))}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True}
    tokenizer = Tokenizer.from_str(json.dumps({"model": model}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    letters = sorted(set("".join([*TRAINING, TEXT])))
    tokenizer.train_from_iterator(
        TRAINING,
        trainers.UnigramTrainer(
            vocab_size=80,
            special_tokens=["<unk>", "</s>", "<pad>"],
            unk_token="<unk>",
            initial_alphabet=letters,
            show_progress=False,
        ),
    )
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(
        TRAINING, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "</s>", "[SEP]", "<pad>"])
    )
    return tokenizer


TYPES = {
    "BPE": bpe,
    "BPE with merges": bpe_with_merges_to_special_tokens,
    "Unigram": unigram,
    "WordPiece": wordpiece,
}


@pytest.mark.parametrize("make", TYPES.values(), ids=TYPES.keys())
def test_special_tokens_in_text_stay_text(tmp_path: Path, make) -> None:
    tokenizer = make()
    # Tokens beyond the vocabulary, special and ordinary, a beginning that a post-processor adds, and a limit.
    tokenizer.add_special_tokens([*SPECIAL])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A </s>", None, [("<bos>", bos), ("</s>", 1)])
    plain = tokenizer.encode(TEXT, add_special_tokens=False).ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(pad_token="<pad>", length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    used = load(tmp_path / "tokenizer.json")
    ids = used.encoder.encode(TEXT, add_special_tokens=False).ids
    special = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    assert special["</s>"] in plain, "the text would give the special token"
    assert not set(ids) & set(special.values())
    assert ids.count(tokenizer.token_to_id("<tool>")) == 1, "an ordinary added token is matched"
    assert (used.eos, used.eos_id) == ("</s>", special["</s>"])
    assert used.vocab_size == 1 + max(tokenizer.get_vocab().values()) == 1 + tokenizer.token_to_id("<tool>")
    if make is bpe:
        assert tokenizer.decode(ids, skip_special_tokens=False) == TEXT
    # Other text has the ids that it always had.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    other = "over the green river < / s > light"
    encoded = used.encoder.encode(other, add_special_tokens=False).ids
    assert encoded == tokenizer.encode(other, add_special_tokens=False).ids


def test_an_ordinary_added_token_that_ends_documents_is_never_in_the_text(tmp_path: Path) -> None:
    tokenizer = bpe()
    tokenizer.add_tokens(["<end>", "<mid>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    used = load(tmp_path / "tokenizer.json", "<end>")
    ids = used.encoder.encode("a <end> b <mid> c").ids
    assert used.eos == "<end>"
    assert used.eos_id not in ids
    assert tokenizer.token_to_id("<mid>") in ids
    with pytest.raises(DataError, match=r"--eos=the is an ordinary piece .* which are </s>, <end>, <mid>"):
        load(tmp_path / "tokenizer.json", "the")


def test_dropout_in_a_tokenizer_is_off(tmp_path: Path) -> None:
    contents = json.loads(bpe().to_str())
    contents["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    used = load(tmp_path / "tokenizer.json")
    assert used.encoder.encode("the river light").ids == bpe().encode("the river light").ids


def test_a_tokenizer_is_found_by_file_folder_or_name(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    assert find(str(tmp_path / "tokenizer.json")) == find(str(tmp_path)) == tmp_path / "tokenizer.json"
    assert find("absent.json") == Path("absent.json")
    snapshot = tmp_path / "models--org--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--model" / "refs").mkdir()
    (tmp_path / "models--org--model" / "refs" / "main").write_text("abc")
    (snapshot / "tokenizer.json").write_text("{}")
    cached = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names: cached(*names, cache_dir=tmp_path))
    assert find("org/model") == snapshot / "tokenizer.json"
    with pytest.raises(DataError, match="download it with `hf download org/other"):
        find("org/other")
