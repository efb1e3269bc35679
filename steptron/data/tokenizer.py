"""The tokenizer as a file: trained, loaded, and identified by the hash of its contents.

texts → train → tokenizer.json → load (EOS found) → encoder of the build's processes
                               → tokenizer_hash → source.json, compared when a run opens its data
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from steptron.errors import DataError

EOS = "<|endoftext|>"
_KNOWN_EOS = (EOS, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|eos|>")
_SMALLEST = len(pre_tokenizers.ByteLevel.alphabet()) + 1


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer ready to encode documents."""

    path: Path
    tokenizer: Tokenizer
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


def load(path: Path, eos: str | None = None) -> LoadedTokenizer:
    """Load a tokenizer.json. `eos` names its end-of-text token (None: the one special token with a usual name).

    Text that spells a special token is encoded as plain text. Raises DataError if the file is missing or unreadable,
    has no such token, or if `eos` is None and the token is not certain.
    """
    digest = tokenizer_hash(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{path} is not a tokenizer.json that the tokenizers library can read ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    names = [eos] if eos else _usual_eos(path, tokenizer)
    eos_id = tokenizer.token_to_id(names[0]) if names else None
    if eos_id is None:
        raise DataError(f"{path} has no token {eos or ' or '.join(_KNOWN_EOS)}: name its end-of-text token with --eos")
    return LoadedTokenizer(path, tokenizer, digest, eos_id)


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
            f"tokenizer {path} does not exist: `steptron data build NAME|SPEC --out DIR` writes DIR/tokenizer.json"
        )
    try:
        contents = json.dumps(json.loads(path.read_text(encoding="utf-8")), sort_keys=True)
    except ValueError as error:
        raise DataError(f"tokenizer {path} is not JSON ({error}): copy or build it again") from error
    return hashlib.blake2b(contents.encode(), digest_size=16).hexdigest()
