"""One shard of tokens in Megatron's indexed format: NAME.bin holds the ids, NAME.idx the starts of documents.

    documents → IndexedWriter → NAME.bin, NAME.idx → IndexedDataset (memory-mapped) → tokens, starts of documents

.bin: the ids of all sequences, one after another, no header.
.idx, little endian: magic (9 bytes) · u64 version 1 · u8 type code · u64 S sequences · u64 D = documents + 1 ·
i32[S] lengths in tokens · i64[S] byte pointers into .bin · i64[D] first sequence of each document, S at the end ·
for multimodal sets i8[S] modes.

The writer makes one sequence per document; the reader also accepts documents of several sequences. Only requested data
are read into memory: a shard of a billion documents costs its reader no more than a small one.
"""

import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from steptron.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _TYPES.items()}
_LONGEST = 2**31 - 1
_AT_ONCE = 2**20
"""The number of documents whose lengths are read at once."""


def token_type(vocab_size: int) -> np.dtype:
    """Return the type in which Megatron stores ids of this vocabulary: two bytes if they suffice."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


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
    """A reader of a shard through memory maps. Raises DataError if it is missing, cut short or not of this format."""

    def __init__(self, prefix: Path) -> None:
        self._bin_path, self._idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        index = _map(self._idx_path)
        self.dtype, num_sequences, num_bounds = self._header(index)
        lengths_end = _HEADER.size + 4 * num_sequences
        # The arrays begin at byte 34, unaligned: views are fine, whole-array numpy calls would copy them.
        self._lengths = np.ndarray(num_sequences, "<i4", buffer=index, offset=_HEADER.size)
        self._pointers = np.ndarray(num_sequences, "<i8", buffer=index, offset=lengths_end)
        self._bounds = np.ndarray(num_bounds, "<i8", buffer=index, offset=lengths_end + 8 * num_sequences)
        if self._bounds[0] != 0 or self._bounds[-1] != num_sequences:
            raise DataError(f"{self._idx_path} is damaged: its documents do not cover its sequences; build it again")
        expected = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize if num_sequences else 0
        actual = self._bin_path.stat().st_size if self._bin_path.is_file() else None
        if actual != expected:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise DataError(f"{self._bin_path} {found}, its .idx says {expected}: copy it again or build it again")
        self._tokens = _map(self._bin_path).view(self.dtype) if expected else np.empty(0, self.dtype)
        self.num_documents = num_bounds - 1
        self.num_tokens = len(self._tokens)

    def offset(self, document: int) -> int:
        """Return the position in tokens at which a document begins; for num_documents, the end of the last one."""
        sequence = int(self._bounds[document])
        return (
            int(self._pointers[sequence]) // self.dtype.itemsize if sequence < len(self._pointers) else self.num_tokens
        )

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) in the stored type, as a view of the map."""
        assert 0 <= start <= stop <= self.num_tokens, f"tokens [{start}, {stop}) outside of {self.num_tokens}"
        return self._tokens[start:stop]

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document."""
        return self.tokens(self.offset(index), self.offset(index + 1))

    def lengths(self) -> Iterator[np.ndarray]:
        """Yield the lengths of the documents in tokens, int64, in order, in arrays of bounded size."""
        for first in range(0, self.num_documents, _AT_ONCE):
            sequences = np.array(self._bounds[first : first + _AT_ONCE + 1])
            offsets = np.full(len(sequences), self.num_tokens, dtype=np.int64)
            inside = sequences < len(self._pointers)
            offsets[inside] = self._pointers[sequences[inside]] // self.dtype.itemsize
            yield np.diff(offsets)

    def check(self, vocab_size: int, eos_id: int) -> int:
        """Read the whole shard and return its largest id, -1 if it has no token.

        Raises DataError unless the sequences follow one another in the .bin, the documents in the sequences, every
        document with tokens ends with eos_id, and every id is in [0, vocab_size).
        """
        self._check_index()
        document, start = 0, 0
        for lengths in self.lengths():
            ends = start + np.cumsum(lengths)
            last = self._tokens[ends[lengths > 0] - 1]
            if (last != eos_id).any():
                bad = int(np.flatnonzero(lengths > 0)[np.argmax(last != eos_id)])
                raise DataError(
                    f"{self._bin_path}: document {document + bad} ends with token {self._tokens[ends[bad] - 1]}, not "
                    f"with the end of a document, {eos_id}: name the right token with --eos, or tokenise again "
                    "with one (Megatron: --append-eod)"
                )
            document, start = document + len(lengths), int(ends[-1])
        largest = -1
        for first in range(0, self.num_tokens, 64 * _AT_ONCE):
            part = self._tokens[first : first + 64 * _AT_ONCE]
            low, largest = int(part.min()), max(largest, int(part.max()))
            if low < 0 or largest >= vocab_size:
                bad = low if low < 0 else largest
                raise DataError(
                    f"{self._bin_path}: token id {bad} does not fit a vocabulary of {vocab_size}: give the tokenizer "
                    "that it was made with"
                )
        return largest

    def _check_index(self) -> None:
        damaged = f"{self._idx_path} is damaged or of another kind"
        if len(self._pointers) and self._pointers[0] != 0:
            raise DataError(f"{damaged}: the first sequence does not begin at byte 0 of the .bin")
        for first in range(0, len(self._pointers), _AT_ONCE):
            pointers = self._pointers[first : first + _AT_ONCE + 1].astype(np.int64)
            lengths = self._lengths[first : first + _AT_ONCE].astype(np.int64)
            wrong = pointers[1:] - pointers[:-1] != lengths[: len(pointers) - 1] * self.dtype.itemsize
            if wrong.any() or (lengths < 0).any():
                bad = first + int(np.argmax(wrong if wrong.any() else lengths < 0))
                raise DataError(f"{damaged}: sequence {bad} and the next do not follow one another in the .bin")
        for first in range(0, len(self._bounds), _AT_ONCE):
            steps = np.diff(self._bounds[first : first + _AT_ONCE + 1])
            if (steps < 0).any():
                bad = first + int(np.argmax(steps < 0))
                raise DataError(f"{damaged}: document {bad} ends before it begins")

    def starts(self, start: int, stop: int) -> np.ndarray:
        """Return the positions in [start, stop) at which documents begin, ascending, int64. Empty documents repeat
        one."""
        documents = range(self.num_documents)
        first = bisect_left(documents, start, key=self.offset)
        end = bisect_left(documents, stop, lo=first, key=self.offset)
        return self._pointers[self._bounds[first:end]] // self.dtype.itemsize

    def _header(self, index: np.ndarray) -> tuple[np.dtype, int, int]:
        """Return the type of the ids, the number of sequences, and the number of documents + 1."""
        if len(index) < _HEADER.size or index[:9].tobytes() != _MAGIC:
            raise DataError(
                f"{self._idx_path} is not a Megatron index (it does not begin with MMIDIDX): build it again"
            )
        _, version, code, num_sequences, num_bounds = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if version != _VERSION or code not in _TYPES or not num_bounds:
            raise DataError(
                f"{self._idx_path}: version {version}, type code {code}; known are version 1, codes {sorted(_TYPES)}"
            )
        plain = _HEADER.size + 12 * num_sequences + 8 * num_bounds
        if len(index) not in (plain, plain + num_sequences):
            raise DataError(
                f"{self._idx_path} has {len(index)} bytes, its header says {plain}: copy it again or build it again"
            )
        return np.dtype(_TYPES[code]), num_sequences, num_bounds


def _map(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"{path} is missing: copy it again or build it again")
    # asarray: a plain array over the same map, as slicing np.memmap objects is slow.
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r")) if path.stat().st_size else np.empty(0, np.uint8)
