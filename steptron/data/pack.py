"""A source's token stream as samples of a stage's length, in a shuffled order that is a pure function of its key.

    ordinal → (epoch, chunk), chunks of an epoch in a pseudo-random order → position → pieces of the stream → sample

Position p is token p mod N of epoch p // N, where N is the number of the source's tokens. Samples are the chunks [c·T,
(c+1)·T) of positions, where T is the stage's length. A chunk belongs to the epoch in which it begins, so each epoch
serves every token exactly once even if N is not a multiple of T; the chunk across the end of an epoch takes its
remaining tokens from the start of the next one. Every epoch starts at another token of the stream, which moves the grid
of cuts. A document border lies wherever pieces meet.

Legend: S tokens of a sample: T inputs, the next token, and one more for each MTP head.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from steptron.data.permute import number, permute


class TokenStream(Protocol):
    """A stream of tokens by position that knows where documents begin."""

    @property
    def num_tokens(self) -> int: ...

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [start, stop) as int64, and the document of each as int32, numbered from 0 at start."""
        ...

    def weights(self, start: int, stop: int, prefix: float) -> np.ndarray:
        """Return the weights of tokens [start, stop) as targets, float32. `prefix`: the weight of metadata prefixes."""
        ...


class Concatenated:
    """The samples of one source in one stage. Every method is pure."""

    waste = 0.0
    """The share of padding in the samples."""

    def __init__(self, stream: TokenStream, seq_len: int, key: tuple[str | int, ...]) -> None:
        """`key` names the order: the same key gives the same samples."""
        self._stream, self._length, self._key = stream, seq_len, key
        self.epoch_tokens = stream.num_tokens
        """The number of tokens of an epoch's samples."""

    def sample(self, ordinal: int, lookahead: int, prefix: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return sample `ordinal` (≥ 0): tokens_S int64, documents_S int32 and weights_S float32.

        `prefix`: the weight of metadata prefixes.
        """
        ranges = _ranges(self._stream, ordinal, self._length, lookahead, self._key)
        tokens_S, documents_S = _read(self._stream, ranges)
        weights = [self._stream.weights(start, stop, prefix) for start, stop in ranges]
        return tokens_S, documents_S, weights[0] if len(weights) == 1 else np.concatenate(weights)


def sample(
    stream: TokenStream, ordinal: int, seq_len: int, lookahead: int, key: tuple[str | int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return sample `ordinal` (≥ 0) of the stream: tokens_S int64 and documents_S int32, S = seq_len + lookahead.

    The first seq_len tokens are the sample's own; the lookahead belongs to the next chunk and serves as target only.
    Documents are numbered from 0 within the sample. `key` names the order: the same key gives the same samples.
    """
    return _read(stream, _ranges(stream, ordinal, seq_len, lookahead, key))


def _read(stream: TokenStream, ranges: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of the ranges one after another, and the document of each, numbered from 0."""
    if len(ranges) == 1:
        return stream.read(*ranges[0])
    size = sum(stop - start for start, stop in ranges)
    tokens_S, documents_S = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int32)
    done, document = 0, 0
    for start, stop in ranges:
        tokens, documents = stream.read(start, stop)
        here = slice(done, done + stop - start)
        tokens_S[here], documents_S[here] = tokens, documents + document
        done, document = here.stop, document + int(documents[-1]) + 1
    return tokens_S, documents_S


def _ranges(
    stream: TokenStream, ordinal: int, seq_len: int, lookahead: int, key: tuple[str | int, ...]
) -> list[tuple[int, int]]:
    """Return the ranges of the stream that make up a sample, in order."""
    position = chunk_position(ordinal, stream.num_tokens, seq_len, key)
    return list(pieces(position, seq_len + lookahead, stream.num_tokens, key))


def chunk_position(ordinal: int, num_tokens: int, seq_len: int, key: tuple[str | int, ...]) -> int:
    """Return the position at which sample `ordinal` begins."""
    epoch = ordinal * seq_len // num_tokens
    first, end = (-(-bound * num_tokens // seq_len) for bound in (epoch, epoch + 1))
    return (first + permute(ordinal - first, end - first, number("order", *key, epoch))) * seq_len


def pieces(position: int, length: int, num_tokens: int, key: tuple[str | int, ...]) -> Iterator[tuple[int, int]]:
    """Return the ranges [start, stop) of the stream that make up positions [position, position + length), in order."""
    while length:
        epoch, within = divmod(position, num_tokens)
        start = (within + number("entry", *key, epoch)) % num_tokens
        size = min(length, num_tokens - within, num_tokens - start)
        yield start, start + size
        position, length = position + size, length - size
