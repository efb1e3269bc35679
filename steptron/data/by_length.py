"""The documents of a source whose length is within limits, as a stream of their own.

    lengths of all documents, read once ─► tokens of the chosen ones before each block of documents
    position in the stream ─► block ─► the chosen documents of the block ─► tokens of the source

The table has one number for 4,096 documents, so that 100 million of them take 200 KB and a fraction of a second.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from steptron.data.source import ShardedSource
from steptron.errors import DataError

_BLOCK = 4096
"""The number of documents of a block."""
_KEPT = 64
"""The number of blocks whose documents are kept in memory."""


class DocumentsByLength:
    """The documents of `source` with at least `least` and at most `most` tokens, EOS included; None: no limit."""

    def __init__(self, source: ShardedSource, least: int | None, most: int | None) -> None:
        """Read all lengths. Raises DataError if no document is chosen."""
        self._source, self._least, self._most = source, least or 1, most
        self.num_documents = longest = 0
        shortest = source.num_tokens
        totals, kept = [], []
        for lengths in source.lengths():
            chosen, starts = self._chosen(lengths), np.arange(0, len(lengths), _BLOCK)
            totals.append(np.add.reduceat(lengths, starts))
            kept.append(np.add.reduceat(lengths * chosen, starts))
            self.num_documents += int(chosen.sum())
            longest, shortest = max(longest, int(lengths.max())), min(shortest, int(lengths.min()))
        if not self.num_documents:
            raise DataError(
                f"no document of {source.folder} has {self._limits()} tokens; they have {shortest} to {longest}: "
                "change the limit, or leave the source out of the mix"
            )
        self._first = np.cumsum(np.concatenate([[0], *totals]))
        """The position in the source of the first document of each block, and at the end the number of its tokens."""
        self._before = np.cumsum(np.concatenate([[0], *kept]))
        """The chosen tokens before each block, and at the end all."""
        self._block = lru_cache(maxsize=_KEPT)(self._read_block)

    @property
    def weighted(self) -> bool:
        """Return True if some weights may not be 1."""
        return self._source.weighted

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of the chosen documents."""
        return int(self._before[-1])

    def read_into(self, start: int, tokens_N: np.ndarray) -> np.ndarray:
        """Write the tokens from `start` on into tokens_N (int64), and return how many of them each document has, in
        order. The sum is N, and none is 0. Raises DataError if an id is not one that the source describes."""
        lengths, done = [], 0
        for _, first, last in self._parts(start, start + len(tokens_N)):
            tokens_N[done : done + last - first] = self._source.tokens(first, last)
            lengths.append(last - first)
            done += last - first
        self.check(tokens_N)
        return np.array(lengths)

    def check(self, tokens_N: np.ndarray) -> None:
        """Raise DataError if an id is not one that the source describes."""
        self._source.check(tokens_N)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop). The caller passes them to `check`."""
        return np.concatenate([self._source.tokens(first, last) for _, first, last in self._parts(start, stop)])

    def weights(self, start: int, stop: int, prefix: float) -> np.ndarray:
        """Return the weights of tokens [start, stop) as targets, float32. `prefix`: the weight of metadata prefixes."""
        return np.concatenate(
            [self._source.weights(first, last, prefix) for _, first, last in self._parts(start, stop)]
        )

    def borders(self, start: int, stop: int) -> np.ndarray:
        """Return the borders of the documents that have tokens in [start, stop), ascending, int64."""
        parts = [self._block(block)[0] for block in self._blocks(start, stop)]
        borders = np.unique(np.concatenate(parts))
        return borders[np.searchsorted(borders, start, "right") - 1 : np.searchsorted(borders, stop) + 1]

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the parts of [start, stop) by document: where it begins, and its range in the source."""
        for block in self._blocks(start, stop):
            places, firsts = self._block(block)
            low = max(0, int(np.searchsorted(places, start, "right")) - 1)
            high = min(len(firsts), int(np.searchsorted(places, stop)))
            for place, end, first in zip(places[low:high], places[low + 1 : high + 1], firsts[low:high], strict=True):
                begin, finish = max(int(place), start), min(int(end), stop)
                yield begin, int(first) + begin - int(place), int(first) + finish - int(place)

    def _blocks(self, start: int, stop: int) -> range:
        """Return the blocks that have tokens in [start, stop), and perhaps empty ones between them."""
        first = int(np.searchsorted(self._before, start, "right")) - 1
        return range(first, int(np.searchsorted(self._before, stop)))

    def _read_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where the chosen documents of a block begin in this stream, with the end of the last one, and where
        in the source."""
        start, stop = self._first[block : block + 2].tolist()
        borders = self._source.borders(start, stop) if stop > start else np.array([start])
        lengths = np.diff(borders)
        chosen = self._chosen(lengths)
        places = self._before[block] + np.concatenate([[0], np.cumsum(lengths[chosen])])
        return places, borders[:-1][chosen]

    def _chosen(self, lengths: np.ndarray) -> np.ndarray:
        return (lengths >= self._least) & (lengths <= (self._most or np.iinfo(np.int64).max))

    def _limits(self) -> str:
        least = f"at least {self._least:,}" if self._least > 1 else ""
        most = f"at most {self._most:,}" if self._most else ""
        return " and ".join(part for part in (least, most) if part)
