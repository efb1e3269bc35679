"""Tokens of a shard that are no targets, or only for a while: NAME.masks beside NAME.bin and NAME.idx.

    spans of characters ─ the tokenizer's offsets ─► tokens ─► MaskWriter → NAME.masks → ShardMasks → weights of a range

Two kinds are kept apart: metadata prefixes, whose weight a run decides, and masked tokens, whose weight is always 0.

NAME.masks, little endian: magic (8 bytes) · u64 P · u64 M · i64[P] borders of prefixes · i64[M] borders of masked
tokens. The borders of a kind are the first token of a span, the token behind its end, the first one of the next span,
and so on: they rise, and a token is in a span if the number of borders up to it is odd. So any range costs one search.
A shard without either kind has no such file.
"""

import struct
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from steptron.data.columns import Column, File
from steptron.errors import DataError

SUFFIX = ".masks"
_MAGIC = b"STEPMASK"
_HEADER = struct.Struct("<8sQQ")

Spans = Sequence[tuple[int, int]]
"""Ranges [start, stop), ascending, without overlaps."""


class Masked(NamedTuple):
    """The tokens of a text that overlap its spans."""

    tokens_L: np.ndarray
    """bool, of each token of the text."""
    num_bytes: int
    """The UTF-8 bytes of the characters of these tokens and of the spans."""


def masked_tokens(text: str, offsets: Iterable[tuple[int, int]], spans: Spans) -> Masked:
    """Return the tokens that overlap a span. `offsets`: the range of characters of each token. Both count characters of
    `text`."""
    begin_L, end_L = np.array(list(offsets), dtype=np.int64).reshape(-1, 2).T
    starts, stops = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    span_L = np.searchsorted(stops, begin_L, "right")  # the first span that ends behind the token's begin
    tokens_L = (span_L < len(spans)) & (np.append(starts, 0)[span_L] < end_L)
    ranges = sorted([*spans, *zip(begin_L[tokens_L].tolist(), end_L[tokens_L].tolist(), strict=True)])
    num_bytes = done = 0
    for start, stop in ranges:
        num_bytes += len(text[max(start, done) : max(stop, done)].encode())
        done = max(stop, done)
    return Masked(tokens_L, num_bytes)


class MaskWriter:
    """The masks of a shard, document after document. The file is written by finish()."""

    def __init__(self) -> None:
        self._prefixes, self._masked = array("q"), array("q")
        self.num_prefix_tokens = self.num_masked_tokens = 0

    def add_document(self, start: int, prefix: int, masked_L: np.ndarray) -> None:
        """Add a document that begins at token `start` of the shard. Its first `prefix` tokens are metadata.

        `masked_L`: bool, of each token of the document with its end; the prefix is not masked.
        """
        if prefix:
            self._prefixes.extend((start, start + prefix))
            self.num_prefix_tokens += prefix
        borders = np.flatnonzero(np.diff(masked_L, prepend=False, append=False))
        self._masked.extend((start + borders).tolist())
        self.num_masked_tokens += int(masked_L.sum())

    def finish(self, path: Path) -> None:
        """Write the file, unless there is nothing to write."""
        if not self._prefixes and not self._masked:
            return
        with path.open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, len(self._prefixes), len(self._masked)))
            for borders in (self._prefixes, self._masked):
                file.write(np.array(borders, dtype="<i8").tobytes())


class ShardMasks:
    """A reader of NAME.masks. Raises DataError if it is missing, cut short or not of this format."""

    def __init__(self, path: Path, num_tokens: int) -> None:
        """Open the file of a shard of `num_tokens` tokens."""
        file = File(path)
        self._path, self._num_tokens = path, num_tokens
        start = file.read(0, min(_HEADER.size, file.size))
        magic, *sizes = _HEADER.unpack(start) if len(start) == _HEADER.size else (b"", 0, 0)
        if magic != _MAGIC or file.size != _HEADER.size + 8 * sum(sizes) or any(size % 2 for size in sizes):
            raise self._damaged("its size or its header is wrong")
        prefixes, masked = sizes
        self._prefixes = Column(file, "<i8", _HEADER.size, prefixes)
        self._masked = Column(file, "<i8", _HEADER.size + 8 * prefixes, masked)
        for column in (self._prefixes, self._masked):
            if column.size and not 0 <= column.at(0) < column.at(column.size - 1) <= num_tokens:
                raise self._damaged("it does not fit its shard")

    def prefixes(self, start: int, stop: int) -> np.ndarray:
        """Return which of the tokens [start, stop) belong to a metadata prefix, bool."""
        return self._inside(self._prefixes, start, stop)

    def masked(self, start: int, stop: int) -> np.ndarray:
        """Return which of the tokens [start, stop) are masked, bool."""
        return self._inside(self._masked, start, stop)

    def weights(self, start: int, stop: int, prefix: float) -> np.ndarray:
        """Return the weights of the tokens [start, stop) as targets, float32. `prefix`: the weight of metadata."""
        weights = np.ones(stop - start, dtype=np.float32)
        if prefix != 1:
            weights[self.prefixes(start, stop)] = prefix
        weights[self.masked(start, stop)] = 0
        return weights

    def _inside(self, column: Column, start: int, stop: int) -> np.ndarray:
        if not column.size:
            return np.zeros(stop - start, dtype=bool)
        guess, count = (place * column.size // self._num_tokens for place in (start, stop - start))
        before, borders = column.between(start, stop, guess, count)
        lengths = np.diff(np.concatenate([(start,), borders, (stop,)]))
        if (lengths < 0).any():
            raise self._damaged("its borders do not rise")
        return np.repeat((before + np.arange(len(lengths))) % 2 == 1, lengths)

    def _damaged(self, how: str) -> DataError:
        return DataError(f"{self._path} is damaged: {how}; copy it again or build it again")
