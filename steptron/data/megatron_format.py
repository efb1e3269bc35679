"""One shard of tokens in Megatron's indexed format: NAME.bin holds the ids, NAME.idx the starts of documents.

    documents → IndexedWriter → NAME.bin, NAME.idx → IndexedDataset → tokens, starts of documents

.bin: the ids of all sequences, one after another, no header.
.idx, little endian: magic (9 bytes) · u64 version 1 · u8 type code · u64 S sequences · u64 D = documents + 1 ·
i32[S] lengths in tokens · i64[S] byte pointers into .bin · i64[D] first sequence of each document, S at the end ·
for multimodal sets i8[S] modes.

The writer makes one sequence per document; the reader also accepts documents of several sequences. Only requested data
are read: a shard of a billion documents costs its reader no more than a small one.
"""

import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from steptron.data.columns import Column, File
from steptron.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _TYPES.items()}
_LONGEST = 2**31 - 1
_TOKENS_AT_ONCE = 2**24
"""The number of tokens that are read at once when all are checked."""
NEGATIVE = 2**63
"""Stands for a negative id. No vocabulary has as many."""
_NEAR = 4096
"""The number of sequences of a part of a shard, for which one place is remembered."""
_PLAIN = 8192
"""The number of documents that are found plain or not at once."""
_AT_ONCE = 2**16
"""The number of documents whose borders are read at once when all are read."""


def token_type(vocab_size: int) -> np.dtype:
    """Return the type in which Megatron stores ids of this vocabulary: two bytes if they suffice."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


def largest_id(ids: np.ndarray) -> int:
    """Return the largest id of an array of integers, NEGATIVE if an id is negative."""
    largest = int(np.maximum.reduce(ids))
    return largest if ids.dtype.kind == "u" or np.minimum.reduce(ids) >= 0 else NEGATIVE


class IndexedWriter:
    """A writer of PREFIX.bin and PREFIX.idx. Both are complete after finish()."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._type = token_type(vocab_size)
        self._vocab_size = vocab_size
        self._prefix = prefix
        self._bin = open(f"{prefix}.bin", "wb")  # noqa: SIM115 (closed by finish)
        self._lengths = array("i")
        self.max_token_id = -1
        self.num_tokens = 0

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document. Raises DataError on an id outside of the vocabulary."""
        tokens = np.asarray(ids, dtype=np.int64)
        if tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self._vocab_size:
                bad = low if low < 0 else high
                raise DataError(f"{self._prefix}.bin: token id {bad} does not fit a vocabulary of {self._vocab_size}")
            self.max_token_id = max(self.max_token_id, high)
        if tokens.size > _LONGEST:
            raise DataError(
                f"{self._prefix}.bin: a document of {tokens.size} tokens; {_LONGEST} is the longest: split it"
            )
        self._bin.write(tokens.astype(self._type).tobytes())
        self._lengths.append(tokens.size)
        self.num_tokens += tokens.size

    def finish(self) -> None:
        """Close PREFIX.bin and write PREFIX.idx."""
        self._bin.close()
        write_index(Path(f"{self._prefix}.idx"), self._type, np.frombuffer(self._lengths, dtype=np.int32))


def write_index(path: Path, token_type: np.dtype, lengths: np.ndarray) -> None:
    """Write the .idx of documents with these lengths in tokens, which follow one another in the .bin."""
    pointers = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1], out=pointers[1:])
    with path.open("wb") as idx:
        idx.write(_HEADER.pack(_MAGIC, _VERSION, _CODES[token_type], len(lengths), len(lengths) + 1))
        idx.write(lengths.astype("<i4").tobytes())
        idx.write((pointers * token_type.itemsize).tobytes())
        idx.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


class IndexedDataset:
    """A reader of a shard. Raises DataError if it is missing, cut short or not of this format."""

    def __init__(self, prefix: Path) -> None:
        self.bin_path, self._idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        index = File(self._idx_path)
        self.dtype, num_sequences, num_bounds = self._header(index)
        lengths_end = _HEADER.size + 4 * num_sequences
        self._lengths = Column(index, "<i4", _HEADER.size, num_sequences)
        self._pointers = Column(index, "<i8", lengths_end, num_sequences)
        self._bounds = Column(index, "<i8", lengths_end + 8 * num_sequences, num_bounds)
        if (self._bounds.at(0), self._bounds.at(num_bounds - 1)) != (0, num_sequences):
            raise DataError(f"{self._idx_path} is damaged: its documents do not cover its sequences; build it again")
        if num_sequences and self._pointers.at(0):
            raise DataError(
                f"{self._idx_path} is damaged: its first sequence does not begin at byte 0 of the .bin; build it again"
            )
        last = num_sequences - 1
        expected = self._pointers.at(last) + self._lengths.at(last) * self.dtype.itemsize if num_sequences else 0
        actual = self.bin_path.stat().st_size if self.bin_path.is_file() else None
        if actual != expected:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise DataError(f"{self.bin_path} {found}, its .idx says {expected}: copy it again or build it again")
        self._tokens = Column(File(self.bin_path), self.dtype, 0, expected // self.dtype.itemsize)
        self.num_documents = num_bounds - 1
        self.num_tokens = self._tokens.size
        self._seen: dict[int, tuple[int, int]] = {}
        """The last position that was searched in each part of the shard, and the sequence that was found."""
        self._is_plain = lru_cache(maxsize=2**16)(self._find_plain)

    def offset(self, document: int) -> int:
        """Return the position in tokens at which a document begins; for num_documents, the end of the last one."""
        return int(self.offsets(document, document)[0])

    def offsets(self, first: int, last: int) -> np.ndarray:
        """Return the positions at which the documents `first` to `last` begin, int64. num_documents has the end of the
        last one."""
        sequences = self._bounds.read(first, last + 1)
        start, stop = int(sequences[0]), int(sequences[-1]) + 1
        pointers = self._pointers.read(start, min(stop, self._pointers.size))
        ends = np.full(stop - start - len(pointers), self.num_tokens * self.dtype.itemsize, dtype=np.int64)
        return np.concatenate([pointers, ends])[sequences - start] // self.dtype.itemsize

    def lengths(self) -> Iterator[np.ndarray]:
        """Yield the lengths of the documents in tokens, int64, in order, in arrays of bounded size. Raises DataError if
        pointers do not rise."""
        for first in range(0, self.num_documents, _AT_ONCE):
            lengths = np.diff(self.offsets(first, min(first + _AT_ONCE, self.num_documents)))
            if (lengths < 0).any():
                raise DataError(self._unsorted())
            yield lengths

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) in the stored type."""
        assert 0 <= start <= stop <= self.num_tokens, f"tokens [{start}, {stop}) outside of {self.num_tokens}"
        return self._tokens.read(start, stop)

    def tokens_into(self, start: int, tokens_N: np.ndarray) -> int:
        """Write the tokens from `start` on into tokens_N, int64, and return the largest id as `largest_id` does."""
        ids_N = self.tokens(start, start + len(tokens_N))
        tokens_N[:] = ids_N
        return largest_id(ids_N)

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document."""
        return self.tokens(self.offset(index), self.offset(index + 1))

    def document_at(self, position: int) -> int:
        """Return the document that holds the token at a position, by reading a few pointers."""
        return bisect_right(range(self.num_documents), position, key=self.offset) - 1

    def check(self, vocab_size: int, eos_id: int) -> int:
        """Read the whole shard and return its largest id, -1 if it has no token.

        Raises DataError unless the sequences follow one another in the .bin, the documents in the sequences, every
        document with tokens ends with eos_id, and every id is in [0, vocab_size).
        """
        self._check_index()
        document, start, largest = 0, 0, -1
        for lengths in self.lengths():
            ends = start + np.cumsum(lengths)
            for first in range(start, int(ends[-1]), _TOKENS_AT_ONCE):
                part = self.tokens(first, min(first + _TOKENS_AT_ONCE, int(ends[-1])))
                low, largest = int(part.min()), max(largest, int(part.max()))
                if low < 0 or largest >= vocab_size:
                    bad = low if low < 0 else largest
                    raise DataError(
                        f"{self.bin_path}: token id {bad} does not fit a vocabulary of {vocab_size}: give the "
                        "tokenizer that it was made with"
                    )
                here = np.flatnonzero((lengths > 0) & (ends > first) & (ends <= first + len(part)))
                last = part[ends[here] - 1 - first]
                if (last != eos_id).any():
                    bad = int(np.argmax(last != eos_id))
                    raise DataError(
                        f"{self.bin_path}: document {document + here[bad]} ends with token {last[bad]}, not with the "
                        f"end of a document, {eos_id}: name the right token with --eos, or tokenise again with one "
                        "(Megatron: --append-eod)"
                    )
            document, start = document + len(lengths), int(ends[-1])
        return largest

    def _check_index(self) -> None:
        damaged = f"{self._idx_path} is damaged or of another kind"
        size, width = self._pointers.size, self.dtype.itemsize
        for first in range(0, size, _AT_ONCE):
            pointers = self._pointers.read(first, min(first + _AT_ONCE + 1, size)).astype(np.int64)
            lengths = self._lengths.read(first, min(first + _AT_ONCE, size)).astype(np.int64)
            wrong = pointers[1:] - pointers[:-1] != lengths[: len(pointers) - 1] * width
            if wrong.any() or (lengths < 0).any():
                bad = first + int(np.argmax(wrong if wrong.any() else lengths < 0))
                raise DataError(f"{damaged}: sequence {bad} and the next do not follow one another in the .bin")
        for first in range(0, self._bounds.size, _AT_ONCE):
            steps = np.diff(self._bounds.read(first, min(first + _AT_ONCE + 1, self._bounds.size)))
            if (steps < 0).any():
                bad = first + int(np.argmax(steps < 0))
                raise DataError(f"{damaged}: document {bad} ends before it begins")

    def parts(self, start: int, stop: int) -> np.ndarray:
        """Return how many of the tokens [start, stop) each document has that has some, in order, int64.

        Raises DataError if pointers do not rise there.
        """
        return self._cut(start, self._starting(start, stop)[1], stop)

    def borders(self, start: int, stop: int) -> np.ndarray:
        """Return the borders of the documents that have tokens in [start, stop), ascending, int64: the first is at
        `start` or before, the last at `stop` or behind."""
        first, inside = self._starting(start, stop)
        self._cut(start, inside, stop)
        begins_here = len(inside) and inside[0] == start
        before = self.offset(first if begins_here else first - 1)
        return _without_repeats(np.concatenate([(before,), inside, (self.offset(first + len(inside)),)]))

    def _starting(self, start: int, stop: int) -> tuple[int, np.ndarray]:
        """Return the first document that begins in [start, stop), and the positions of all that do.

        The search begins where an earlier one in the same part of the shard ended: a guess from there is nearly right.
        """
        width, size = self.dtype.itemsize, self._pointers.size
        part = start * size // (self.num_tokens * _NEAR)
        known, place = self._seen.get(part, (0, 0))
        guess = place + (start - known) * size // self.num_tokens
        sequence, pointers = self._pointers.between(
            start * width, stop * width, guess, (stop - start) * size // self.num_tokens
        )
        self._seen[part] = start, sequence
        last = sequence + len(pointers)
        if all(map(self._is_plain, range(max(sequence - 1, 0) // _PLAIN, last // _PLAIN + 1))):
            return sequence, pointers // width
        first, bounds = self._bounds.between(sequence, last, sequence, last - sequence)
        return first, pointers[bounds - sequence] // width

    def _find_plain(self, block: int) -> bool:
        """Return True if document n has sequence n alone, for all n of a block. The writer makes no others."""
        first, last = block * _PLAIN, min((block + 1) * _PLAIN + 1, self._bounds.size)
        return first < last and bool((self._bounds.read(first, last) == np.arange(first, last)).all())

    def _cut(self, start: int, inside: np.ndarray, stop: int) -> np.ndarray:
        """Return the lengths of the parts into which [start, stop) is cut, without empty ones. Raises DataError if the
        cuts do not rise."""
        edges = np.empty(len(inside) + 2, dtype=np.int64)
        edges[0], edges[1:-1], edges[-1] = start, inside, stop
        lengths = edges[1:] - edges[:-1]
        shortest = np.minimum.reduce(lengths)
        if shortest < 0:
            raise DataError(self._unsorted())
        # A document may begin at start, and there may be empty ones.
        return lengths if shortest else lengths[lengths > 0]

    def _unsorted(self) -> str:
        return f"{self._idx_path} is damaged: its pointers do not rise; copy it again or build it again"

    def _header(self, index: File) -> tuple[np.dtype, int, int]:
        """Return the type of the ids, the number of sequences, and the number of documents + 1."""
        start = index.read(0, min(_HEADER.size, index.size))
        if len(start) < _HEADER.size or not start.startswith(_MAGIC):
            raise DataError(
                f"{self._idx_path} is not a Megatron index (it does not begin with MMIDIDX): build it again"
            )
        _, version, code, num_sequences, num_bounds = _HEADER.unpack(start)
        if version != _VERSION or code not in _TYPES or not num_bounds:
            raise DataError(
                f"{self._idx_path}: version {version}, type code {code}; known are version 1, codes {sorted(_TYPES)}"
            )
        plain = _HEADER.size + 12 * num_sequences + 8 * num_bounds
        if index.size not in (plain, plain + num_sequences):
            raise DataError(
                f"{self._idx_path} has {index.size} bytes, its header says {plain}: copy it again or build it again"
            )
        return np.dtype(_TYPES[code]), num_sequences, num_bounds


def _without_repeats(numbers: np.ndarray) -> np.ndarray:
    """Return the different numbers of an ascending array."""
    return np.concatenate([numbers[:1], numbers[1:][numbers[1:] > numbers[:-1]]])
