"""A source as samples of a stage's length in which no document is cut that fits into one: best-fit packing.

    stream ─► segments of 64 samples' tokens ─► windows: some segments of an order that is a function of the key
                                                    │ documents that begin there, in pieces of at most T tokens
                                                    └► best fit decreasing ─► a fixed number of bins ─► samples

Ding et al. ("Fewer truncations improve language modeling", 2024) sort documents by length, and put each into the bin
with the least room that is left for it. They pack a whole corpus; any sample can be had here at once, because a window
is packed by itself and its number of bins is a constant of the source: each segment adds as many. The constant comes
from a few windows, packed for it at the start, and has room for all tokens of any window. What is left of a row is
padding: its tokens are targets of weight 0. Only if the documents of a window do not fit into its bins, because they
differ much from those of other windows, or if it has fewer documents than bins, are some of them cut.

A document longer than T is cut at multiples of T from its beginning. Each epoch serves every token exactly once.

Legend: T the stage's length, S = T + lookahead (the next token, and one more for each MTP head).
"""

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from steptron.data.permute import number, permute

_SEGMENT = 64
"""The length of a segment, in samples. Longer segments need less room for documents across their ends."""
_MOST_SEGMENTS = 16
"""The largest number of segments of a window: the places of the stream that neighbouring samples come from."""
_DOCUMENTS = 4096
"""The number of documents that a window may have on average, which bounds the time to pack it."""
_PILOTS = 4
"""The number of windows that are packed to find the number of bins."""
_SAND = 64
"""Documents shorter than this part of a bin are not searched a place for."""
_SLACK = 1.01
"""The bins of a segment over those that the fullest of these windows needed."""


class DocumentStream(Protocol):
    """A stream of tokens that knows where documents begin and end."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_documents(self) -> int: ...

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop). The caller passes them to `check`."""
        ...

    def check(self, tokens_N: np.ndarray) -> None:
        """Raise DataError if an id is not one that the source describes."""
        ...

    @property
    def weighted(self) -> bool:
        """Return True if some weights may not be 1."""
        ...

    def weights(self, start: int, stop: int, prefix: float) -> np.ndarray:
        """Return the weights of tokens [start, stop) as targets, float32. `prefix`: the weight of metadata prefixes."""
        ...

    def borders(self, start: int, stop: int) -> np.ndarray:
        """Return the borders of the documents that have tokens in [start, stop), ascending, int64."""
        ...


class Piece(NamedTuple):
    """Tokens [start, stop) of the stream, of a document that ends at `end`."""

    start: int
    stop: int
    end: int


class BestFit:
    """The samples of one source in one stage. Every method is pure."""

    weighted = True
    """True if some weights may not be 1: those of padding."""

    def __init__(self, stream: DocumentStream, seq_len: int, key: tuple[str | int, ...]) -> None:
        """Find the number of bins. `key` names the order: the same key gives the same samples."""
        self._stream, self._length, self._key = stream, seq_len, key
        self._segments = max(1, stream.num_tokens // (_SEGMENT * seq_len))
        documents = -(-stream.num_documents // self._segments)
        self._in_window = min(_MOST_SEGMENTS, self._segments, max(1, _DOCUMENTS // max(documents, 1)))
        self._bins_by_segment = self._needed_bins()
        self._bins = lru_cache(maxsize=4)(self._pack)
        self.num_samples = self._segments * self._bins_by_segment
        """The number of samples of an epoch."""
        self.epoch_tokens = self.num_samples * seq_len
        """The number of tokens of an epoch's samples, padding included."""
        self.waste = 1 - stream.num_tokens / self.epoch_tokens
        """The share of them that is padding."""

    def fill(self, ordinal: int, tokens_S: np.ndarray, weights_S: np.ndarray, prefix: float = 1.0) -> np.ndarray:
        """Write sample `ordinal` (≥ 0) into tokens_S (int64) and weights_S (float32, all 1 before), and return how many
        tokens each document has in it. Padding counts as a document behind the others.

        Behind the first T tokens are the next ones of a document that continues after the row, or padding. `prefix`:
        the weight of metadata prefixes.
        """
        lengths, done = [], 0
        for start, stop, end in self.pieces(ordinal):
            if done + stop - start == self._length:
                stop = min(stop + len(tokens_S) - self._length, end)
            here = slice(done, done + stop - start)
            tokens_S[here] = self._stream.tokens(start, stop)
            if self._stream.weighted:
                weights_S[here] = self._stream.weights(start, stop, prefix)
            lengths.append(stop - start)
            done = here.stop
        self._stream.check(tokens_S[:done])  # all at once: pieces are small
        if done < len(tokens_S):
            lengths.append(len(tokens_S) - done)
            tokens_S[done:] = 0
            weights_S[done:] = 0
        return np.array(lengths)

    def pieces(self, ordinal: int) -> list[Piece]:
        """Return the pieces of documents in sample `ordinal`, in order."""
        epoch, within = divmod(ordinal, self.num_samples)
        window, place = divmod(within, self._in_window * self._bins_by_segment)
        pieces, bins = self._bins(epoch, window)
        members = bins[permute(place, len(bins), number("bins", *self._key, epoch, window))]
        return [Piece(*piece) for piece in pieces[members].tolist()]

    def _needed_bins(self) -> int:
        """Return the number of bins of a segment."""
        windows = -(-self._segments // self._in_window)
        shares = []
        for window in sorted({place * windows // _PILOTS for place in range(_PILOTS)}):
            pieces = self._pieces_of(0, window)
            bins, _ = best_fit(pieces[:, 1] - pieces[:, 0], self._length, len(pieces))
            shares.append(len(bins) / self._segments_of(window))
        if self._segments == 1:
            return int(shares[0])
        longest = -(-self._stream.num_tokens // self._segments) + self._length - 1  # with the last document's rest
        return int(max(-(-longest // self._length), np.ceil(max(shares) * _SLACK)))

    def _segments_of(self, window: int) -> int:
        """Return the number of segments of a window; the last one may have fewer."""
        return min(self._in_window, self._segments - window * self._in_window)

    def _pieces_of(self, epoch: int, window: int) -> np.ndarray:
        """Return all pieces of a window, int64 [pieces, 3]: the fields of `Piece`."""
        parts, key = [], number("segments", *self._key, epoch)
        for place in range(window * self._in_window, window * self._in_window + self._segments_of(window)):
            segment = permute(place, self._segments, key)
            start, stop = (bound * self._stream.num_tokens // self._segments for bound in (segment, segment + 1))
            parts.append(pieces_between(self._stream.borders(start, stop), start, stop, self._length))
        return np.concatenate(parts)

    def _pack(self, epoch: int, window: int) -> tuple[np.ndarray, list[list[int]]]:
        """Return the pieces of a window, and the places of each bin's in them."""
        pieces = self._pieces_of(epoch, window)
        count = self._segments_of(window) * self._bins_by_segment
        packed, left = best_fit(pieces[:, 1] - pieces[:, 0], self._length, count)
        _share_out(packed, count)
        if len(packed) == count and not left:
            return pieces, packed
        known = [Piece(*piece) for piece in pieces.tolist()]
        bins = [[known[place] for place in members] for members in packed]
        _cut_in_halves(bins, count)
        _cut_into(bins, [known[place] for place in left], self._length)
        places = itertools.count()
        return np.array([piece for one in bins for piece in one]), [[next(places) for _ in one] for one in bins]


def pieces_between(borders: np.ndarray, start: int, stop: int, longest: int) -> np.ndarray:
    """Return the pieces that begin in [start, stop) of the documents with these borders, in order: int64 [pieces, 3],
    the fields of `Piece`."""
    first, end = borders[:-1], borders[1:]
    lowest = np.maximum(0, -(-(start - first) // longest))
    counts = np.maximum(0, -(-(np.minimum(stop, end) - first) // longest) - lowest)
    document = np.repeat(np.arange(len(first)), counts)
    within = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = first[document] + (lowest[document] + within) * longest
    return np.stack([starts, np.minimum(starts + longest, end[document]), end[document]], axis=1)


def best_fit(lengths: np.ndarray, size: int, most: int) -> tuple[list[list[int]], list[int]]:
    """Return at most `most` bins of `size` tokens, each a list of places in `lengths`, and the places without a bin.

    From the longest on, each goes to the bin with the least room that is left for it, or to a new one. What is shorter
    than 1/64 of a bin then fills the rooms as it comes, which takes no search and wastes less than that.
    """
    large, sand = _longest_first(lengths, size)
    bins: list[list[int]] = []
    left: list[int] = []
    rooms: list[int] = []
    """The room of the bins that are not full, ascending."""
    owners: list[int] = []
    """The bin of each of these rooms."""
    for place, length in zip(large.tolist(), lengths[large].tolist(), strict=True):
        found = bisect_left(rooms, length)
        if found < len(rooms):
            room, owner = rooms.pop(found) - length, owners.pop(found)
            bins[owner].append(place)
        elif len(bins) < most:
            room, owner = size - length, len(bins)
            bins.append([place])
        else:
            left.append(place)
            continue
        if room:
            found = bisect_left(rooms, room)
            rooms.insert(found, room)
            owners.insert(found, owner)
    ends, taken = np.cumsum(lengths[sand]), 0
    while taken < len(sand):
        if rooms:
            room, owner = rooms.pop(0), owners.pop(0)
        elif len(bins) < most:
            room, owner = size, len(bins)
            bins.append([])
        else:
            break
        before = ends[taken - 1] if taken else 0
        until = int(ends.searchsorted(before + room, "right"))
        bins[owner] += sand[taken:until].tolist()
        taken = until
    return bins, left + sand[taken:].tolist()


def _longest_first(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the lengths of at least 1/64 of `size`, and those of the others, both from the longest on;
    equal ones keep their order."""
    is_sand, limit = lengths * _SAND < size, -(-size // _SAND)
    large, sand = np.flatnonzero(~is_sand), np.flatnonzero(is_sand)
    narrow = (limit - lengths[sand]).astype(np.min_scalar_type(limit))  # numpy sorts 16 bits by radix
    return large[np.argsort(-lengths[large], kind="stable")], sand[np.argsort(narrow, kind="stable")]


def _share_out(bins: list[list[int]], count: int) -> None:
    """Make up to `count` bins: those with the most pieces give half of them. A row without a document would have
    nothing to learn from."""
    while len(bins) < count and len(donor := max(bins, key=len)) > 1:
        half = len(donor) // 2
        bins.append(donor[half:])
        del donor[half:]


def _cut_in_halves(bins: list[list[Piece]], count: int) -> None:
    """Make `count` bins where each has one piece: the longest ones are cut in half."""
    while len(bins) < count:
        donor = max(bins, key=lambda pieces: pieces[0].stop - pieces[0].start)
        start, stop, end = donor[0]
        middle = (start + stop) // 2
        assert middle > start, f"{count} samples of {len(bins)} tokens"
        donor[0] = Piece(start, middle, end)
        bins.append([Piece(middle, stop, end)])


def _cut_into(bins: list[list[Piece]], left: Sequence[Piece], size: int) -> None:
    """Put the pieces that are left into the room of the bins, cut where it ends."""
    target = 0
    for start, stop, end in left:
        while start < stop:
            room = size - sum(piece.stop - piece.start for piece in bins[target])
            if not room:
                target += 1
                continue
            here = min(stop, start + room)
            bins[target].append(Piece(start, here, end))
            start = here
