"""The tokenizer as a file: found, trained, loaded, and identified by the hash of its contents.

file, folder or Hub name → find ─┐
texts → train ───────────────────┴→ tokenizer.json → load (EOS found) → encoder of the build's processes
                                                   → tokenizer_hash → source.json, compared when a run opens its data
"""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from steptron.atomic import atomic_write
from steptron.errors import DataError

EOS = "<|endoftext|>"
_KNOWN_EOS = (EOS, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|eos|>")
_SMALLEST = len(pre_tokenizers.ByteLevel.alphabet()) + 1


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer ready to encode documents."""

    path: Path
    tokenizer: Tokenizer
    encoder: Tokenizer
    """A copy of the tokenizer that never makes a special token or EOS of text."""
    hash: str
    eos_id: int

    @property
    def eos(self) -> str:
        """Return the token of eos_id."""
        return self.tokenizer.id_to_token(self.eos_id) or ""

    @property
    def vocab_size(self) -> int:
        """Return the bound of the ids: all are below it."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def train(texts: Iterator[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE with EOS as token 0 and write it to path. It encodes any text without loss."""
    if vocab_size < _SMALLEST:
        raise DataError(f"--vocab-size={vocab_size} is too small: 256 bytes and {EOS} need at least {_SMALLEST}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise DataError(
            f"--vocab-size={vocab_size}: the text gives no more than {found} tokens: ask for {found} or less"
        )
    tokenizer.save(str(path))


def find(name: str) -> Path:
    """Return the tokenizer.json that `name` means: a file, a folder that holds one, or a Hub model in the local cache.

    Raises DataError if the folder or the cache lacks it. A file that does not exist is reported when it is read.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise DataError(
                f"--tokenizer {name}: the folder has no tokenizer.json: name another, or write one from its files with "
                "transformers (AutoTokenizer, save_pretrained)"
            )
        return path / "tokenizer.json"
    if path.is_file() or path.suffix == ".json" or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return path
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "tokenizer.json")
    if not isinstance(cached, str):
        raise DataError(
            f"--tokenizer {name} is no file, no folder, and no model whose tokenizer.json is in the local cache of the "
            f"Hugging Face Hub: give a path, or download it with `hf download {shlex.quote(name)} tokenizer.json`"
        )
    return Path(cached)


def put(given: Path, path: Path, eos: str | None) -> None:
    """Copy a tokenizer.json to `path`. Raises DataError if it cannot be used, or if another one is there."""
    if not path.is_file():
        load(given, eos)
        with atomic_write(path, durable=True) as temporary:
            shutil.copyfile(given, temporary)
    elif tokenizer_hash(given) != tokenizer_hash(path):
        raise DataError(f"{path} is not --tokenizer {given}: the sources of a folder share one, give another --out")


def load(path: Path, eos: str | None = None) -> LoadedTokenizer:
    """Load a tokenizer.json. `eos` names its end-of-text token (None: the one special token with a usual name).

    Raises DataError if the file is missing or unreadable, has no such token, if `eos` is no added token, or if it is
    None and the token is not certain.
    """
    digest = tokenizer_hash(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{path} is not a tokenizer.json that the tokenizers library can read ({error})") from error
    names = [eos] if eos else _usual_eos(path, tokenizer)
    eos_id = tokenizer.token_to_id(names[0]) if names else None
    if eos_id is None:
        raise DataError(f"{path} has no token {eos or ' or '.join(_KNOWN_EOS)}: name its end-of-text token with --eos")
    added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    if names[0] not in added:
        known = ", ".join(sorted(added)) or "none"
        raise DataError(
            f"--eos={eos} is an ordinary piece of the vocabulary of {path}, which text may contain: name one of its "
            f"added tokens, which are {known}"
        )
    hidden = [name for name, special in added.items() if special or name == names[0]]
    encoder = _encoder(json.loads(path.read_text(encoding="utf-8")), hidden)
    return LoadedTokenizer(path, tokenizer, encoder, digest, eos_id)


def _encoder(contents: dict[str, Any], hidden: Iterable[str]) -> Tokenizer:
    """Return a tokenizer with the same ids that never gives the `hidden` tokens for text that spells them.

    Not matching added tokens (`encode_special_tokens`) is not enough. A model may also hold a special token as a piece
    (Unigram), as the result of a merge (BPE), or as a word (WordPiece, BPE with `ignore_merges`). So the hidden tokens
    get names that no text contains, in the model and among the added tokens, and keep their ids.
    """
    names = {
        name: _unspeakable(name) for name in hidden if len(name) > 1 and not re.fullmatch(r"<0x[0-9A-F]{2}>", name)
    }
    for token in contents.get("added_tokens", ()):
        if token["content"] in names:
            token |= {"content": names[token["content"]], "special": True, "normalized": False}
    model = contents["model"]
    if "dropout" in model:
        model["dropout"] = None  # merges left out at random are for a training that tokenises as it goes
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: pairs of piece and score, in the order of the ids
        model["vocab"] = [[names.get(piece, piece), *score] for piece, *score in vocab]
    else:
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocab.items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]
    contents |= {"truncation": None, "padding": None, "post_processor": None}
    encoder = Tokenizer.from_str(json.dumps(contents))
    encoder.encode_special_tokens = True
    return encoder


def _unspeakable(name: str) -> str:
    """Return another name for a token: a private character and a hash, which are in no text."""
    return "\U000f5354" + hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


def _usual_eos(path: Path, tokenizer: Tokenizer) -> list[str]:
    """Return the special token with a usual name. An ordinary token, which text may spell, is never chosen."""
    found = [name for name in _KNOWN_EOS if tokenizer.token_to_id(name) is not None]
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    certain = [name for name in found if name in special]
    if found and len(certain) != 1:
        kinds = ", ".join(f"{name} ({'special' if name in special else 'ordinary'})" for name in found)
        raise DataError(f"{path}: which token ends a document is not certain: name one with --eos; there are {kinds}")
    return certain


def tokenizer_hash(path: Path) -> str:
    """Return a 128-bit hash of a tokenizer.json's contents, without its JSON layout. Raises DataError if it is
    unreadable."""
    if not path.is_file():
        raise DataError(
            f"tokenizer {path} does not exist: `steptron data tokenizer SOURCE … --out FILE` trains one, and "
            "`steptron data build NAME|SPEC --out DIR` writes DIR/tokenizer.json"
        )
    try:
        contents = json.dumps(json.loads(path.read_text(encoding="utf-8")), sort_keys=True)
    except ValueError as error:
        raise DataError(f"tokenizer {path} is not JSON ({error}): copy or build it again") from error
    return hashlib.blake2b(contents.encode(), digest_size=16).hexdigest()
