"""A source's token stream as samples of a stage's length, in a shuffled order that is a pure function of its key.

    ordinal → (epoch, chunk), chunks of an epoch in a pseudo-random order → position → pieces of the stream → sample

Position p is token p mod N of epoch p // N, where N is the number of the source's tokens. Samples are the chunks [c·T,
(c+1)·T) of positions, where T is the stage's length. A chunk belongs to the epoch in which it begins, so each epoch
serves every token exactly once even if N is not a multiple of T; the chunk across the end of an epoch takes its
remaining tokens from the start of the next one. Every epoch starts at another token of the stream, which moves the grid
of cuts. A document border lies wherever pieces meet.

Legend: S tokens of a sample: T inputs, the next token, and one more for each MTP head.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol

import numpy as np

from steptron.data.columns import joined
from steptron.data.permute import number, permute


class TokenStream(Protocol):
    """A stream of tokens by position that knows where documents begin."""

    @property
    def num_tokens(self) -> int: ...

    def read_into(self, start: int, tokens_N: np.ndarray) -> np.ndarray:
        """Write the tokens from `start` on into tokens_N (int64), and return how many of them each document has, in
        order. The sum is N, and none is 0. Raises DataError if an id is not one that the source describes."""
        ...

    @property
    def weighted(self) -> bool:
        """Return True if some weights may not be 1."""
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
        self.weighted = stream.weighted
        """True if some weights may not be 1."""

    def fill(self, ordinal: int, tokens_S: np.ndarray, weights_S: np.ndarray, prefix: float = 1.0) -> np.ndarray:
        """Write sample `ordinal` (≥ 0) into tokens_S (int64) and weights_S (float32, all 1 before), and return how many
        tokens each document has in it.

        The first T tokens are the sample's own; the others belong to the next chunk and serve as targets only.
        `prefix`: the weight of metadata prefixes.
        """
        position = chunk_position(ordinal, self._stream.num_tokens, self._length, self._key)
        lengths, done = [], 0
        for start, stop in pieces(position, len(tokens_S), self._stream.num_tokens, self._key):
            here = slice(done, done + stop - start)
            lengths.append(self._stream.read_into(start, tokens_S[here]))
            if self.weighted:
                weights_S[here] = self._stream.weights(start, stop, prefix)
            done = here.stop
        return joined(lengths)


def chunk_position(ordinal: int, num_tokens: int, seq_len: int, key: tuple[str | int, ...]) -> int:
    """Return the position at which sample `ordinal` begins."""
    first, size, order = _epoch(ordinal * seq_len // num_tokens, num_tokens, seq_len, key)
    return (first + permute(ordinal - first, size, order)) * seq_len


@lru_cache(maxsize=1024, typed=True)
def _epoch(epoch: int, num_tokens: int, seq_len: int, key: tuple[str | int, ...]) -> tuple[int, int, int]:
    """Return the first chunk of an epoch, the number of its chunks, and the number that names their order."""
    first, end = (-(-bound * num_tokens // seq_len) for bound in (epoch, epoch + 1))
    return first, end - first, number("order", *key, epoch)


def pieces(position: int, length: int, num_tokens: int, key: tuple[str | int, ...]) -> Iterator[tuple[int, int]]:
    """Return the ranges [start, stop) of the stream that make up positions [position, position + length), in order."""
    while length:
        epoch, within = divmod(position, num_tokens)
        start = (within + number("entry", *key, epoch)) % num_tokens
        size = min(length, num_tokens - within, num_tokens - start)
        yield start, start + size
        position, length = position + size, length - size
