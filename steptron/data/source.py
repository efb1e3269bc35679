"""A source: a folder of shards and a source.json that describes them, read as one stream of tokens.

    source.json → SourceInfo (strict) ─┐
    shard-00000.bin/.idx … ────────────┴→ ShardedSource → tokens, documents and weights of any range of the stream

source.json holds what the shard format lacks: the tokenizer's hash, vocabulary, counts, sizes and checksums. Sizes are
compared when a source is opened, checksums by `steptron data verify`.
"""

import dataclasses
import hashlib
import json
import shlex
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from steptron.data import masks
from steptron.data.columns import joined
from steptron.data.megatron_format import IndexedDataset, largest_id
from steptron.data.readers import Unread
from steptron.errors import DataError, typed

INFO_NAME = "source.json"
DROPPED_NAME = "dropped.jsonl"
"""The beginnings of documents that a filter left out, and why: the first of each shard."""
_FORMAT = "steptron-source-1"
_OPEN_SHARDS = 32
"""The number of shards that stay open at a time. Each holds two file descriptors, with masks three."""


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard of a source."""

    name: str
    """The file name without .bin, .idx or .masks."""
    num_documents: int
    """The number of documents."""
    num_tokens: int
    """The number of tokens, with the EOS of each document."""
    bin_bytes: int
    """The size of the .bin file in bytes."""
    idx_bytes: int
    """The size of the .idx file in bytes."""
    bin_blake2b: str
    """The checksum of the .bin file, 128 bits."""
    idx_blake2b: str
    """The checksum of the .idx file, 128 bits."""
    num_prefix_tokens: int = 0
    """The number of tokens of metadata prefixes."""
    num_masked_tokens: int = 0
    """The number of tokens that are never a target."""
    masks_bytes: int = 0
    """The size of the .masks file in bytes. 0: the shard has none, since it has no such tokens."""
    masks_blake2b: str = ""
    """The checksum of the .masks file, 128 bits."""

    def files(self, folder: Path) -> Iterator[tuple[Path, int, str]]:
        """Yield path, size and checksum of the shard's files."""
        yield folder / f"{self.name}.bin", self.bin_bytes, self.bin_blake2b
        yield folder / f"{self.name}.idx", self.idx_bytes, self.idx_blake2b
        if self.masks_bytes:
            yield folder / f"{self.name}{masks.SUFFIX}", self.masks_bytes, self.masks_blake2b

    def without_masks(self) -> "ShardInfo":
        """Return the description of the tokens alone."""
        return dataclasses.replace(self, num_prefix_tokens=0, num_masked_tokens=0, masks_bytes=0, masks_blake2b="")


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """The content of source.json."""

    spec: str
    """The inputs that `steptron data` was given, as a shell takes them."""
    action: str = "build"
    """The action of `steptron data` that made the source: build or import."""
    origin: str
    """The hash of the inputs and of how they were read. The same origin and tokenizer give the same shards."""
    inputs: str = ""
    """The hash of the inputs alone, the same on both sides of a split. Empty in a source of an older version."""
    hold_out: float = 0.0
    """The share of the inputs' documents that is held out for evaluation (`--hold-out`)."""
    held_out: bool = False
    """True if the source has the held-out documents, False if it has the others."""
    tokenizer_hash: str
    """The hash of the tokenizer's contents."""
    vocab_size: int
    """The number of tokens of the tokenizer."""
    eos_id: int
    """The id at the end of each document."""
    eos: str = ""
    """The token of eos_id. Empty in a source of an older version."""
    max_token_id: int
    """The largest id in the shards."""
    num_documents: int
    """The number of documents in all shards."""
    num_tokens: int
    """The number of tokens in all shards."""
    num_text_bytes: int
    """The number of UTF-8 bytes of the text, without metadata and masked tokens. 0 if it is unknown: the source was
    imported."""
    unread: tuple[Unread, ...] = ()
    """The files and records that were left out, each with the reason."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """The number of documents that each filter left out. dropped.jsonl shows the beginnings of some."""
    shards: tuple[ShardInfo, ...]
    """The shards, in the order of the stream."""

    @property
    def num_prefix_tokens(self) -> int:
        """Return the number of tokens of metadata prefixes."""
        return sum(shard.num_prefix_tokens for shard in self.shards)

    @property
    def num_masked_tokens(self) -> int:
        """Return the number of tokens that are never a target."""
        return sum(shard.num_masked_tokens for shard in self.shards)

    @property
    def bytes_per_token(self) -> float:
        """Return the mean number of bytes of text for each token that is neither metadata nor masked. 0 if it is not
        known."""
        return self.num_text_bytes / max(1, self.num_tokens - self.num_prefix_tokens - self.num_masked_tokens)

    @property
    def identity(self) -> str:
        """Return a hash of the tokens and their masks. It is the same for a copy of the folder anywhere."""
        parts = [f"{shard.bin_blake2b} {shard.idx_blake2b} {shard.masks_blake2b}".rstrip() for shard in self.shards]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    @property
    def tokens_identity(self) -> str:
        """Return a hash of the tokens alone."""
        return dataclasses.replace(self, shards=tuple(shard.without_masks() for shard in self.shards)).identity

    def write(self, folder: Path) -> None:
        (folder / INFO_NAME).write_text(json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n")


def read_info(folder: Path) -> SourceInfo:
    """Return the content of the folder's source.json. Raises DataError if it is missing or of another version."""
    path = folder / INFO_NAME
    if not path.is_file():
        found = "has no source.json" if folder.is_dir() else "does not exist"
        raise DataError(
            f"{folder} {found}: name the folder of one source, or make it: `steptron data build NAME|SPEC --out DIR`"
        )
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        if values.pop("format", None) != _FORMAT:
            raise TypeError(f"no format {_FORMAT}")
        shards = tuple(ShardInfo(**shard) for shard in values.pop("shards"))
        unread = tuple(Unread(**place) for place in values.pop("unread", ()))
        return SourceInfo(**values, unread=unread, shards=shards)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged or of another version ({error}): build the source again") from error


class ShardedSource:
    """The shards of a folder as one stream of num_tokens tokens. Shards are opened when they are read."""

    def __init__(self, folder: Path) -> None:
        """Open the source. Raises DataError if source.json or a shard is missing, or a size differs from the recorded
        one."""
        self.folder = folder
        self.info = read_info(folder)
        for path, size, _ in (file for shard in self.info.shards for file in shard.files(folder)):
            actual = path.stat().st_size if path.is_file() else None
            if actual != size:
                found = "is missing" if actual is None else f"has {actual} bytes"
                raise DataError(f"{path} {found}, source.json says {size}: {self._way_out()}")
        self._starts = [0, *accumulate(shard.num_tokens for shard in self.info.shards)]
        if self._starts[-1] != self.info.num_tokens:
            raise DataError(
                f"{folder / INFO_NAME}: num_tokens={self.info.num_tokens}, but its shards sum to {self._starts[-1]}"
            )
        if not self.num_tokens:
            raise DataError(
                f"{folder} is empty (0 tokens): build it from documents with text, or remove it from the recipe"
            )
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(self._open)
        self._masks = lru_cache(maxsize=_OPEN_SHARDS)(self._open_masks)
        self.weighted = any(shard.masks_bytes for shard in self.info.shards)
        """True if some weights may not be 1."""

    @property
    def num_tokens(self) -> int:
        return self.info.num_tokens

    @property
    def num_documents(self) -> int:
        return self.info.num_documents

    @property
    def num_files(self) -> int:
        """Return the number of files of all shards."""
        return sum(1 for shard in self.info.shards for _ in shard.files(self.folder))

    @property
    def num_file_bytes(self) -> int:
        """Return the size of all shards in bytes."""
        return sum(size for shard in self.info.shards for _, size, _ in shard.files(self.folder))

    def read_into(self, start: int, tokens_N: np.ndarray) -> np.ndarray:
        """Write the tokens from `start` on into tokens_N (int64), and return how many of them each document has, in
        order. The sum is N, and none is 0. Raises DataError if an id is not in [0, max_token_id]."""
        stop, done, lengths = start + len(tokens_N), 0, []
        assert 0 <= start < stop <= self.num_tokens, f"tokens [{start}, {stop}) outside of {self.num_tokens}"
        for shard, _, first, last in self._parts(start, stop):
            here = tokens_N[done : done + last - first]
            if shard.tokens_into(first, here) > self.info.max_token_id:
                bad = first + int(here.view(np.uint64).argmax())
                raise self._outside(here, f" in document {shard.document_at(bad)} of {shard.bin_path.name}")
            lengths.append(shard.parts(first, last))
            done += last - first
        return joined(lengths)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) in the stored type. The caller passes them to `check`."""
        return joined([shard.tokens(first, last) for shard, _, first, last in self._parts(start, stop)])

    def check(self, tokens_N: np.ndarray) -> None:
        """Raise DataError if an id is not in [0, max_token_id]: the shards are not those that source.json describes."""
        if largest_id(tokens_N) > self.info.max_token_id:
            raise self._outside(tokens_N, "")

    def weights(self, start: int, stop: int, prefix: float) -> np.ndarray:
        """Return the weights of tokens [start, stop) as targets, float32. `prefix`: the weight of metadata prefixes."""
        weights = np.ones(stop - start, dtype=np.float32)
        if self.weighted:
            for index, base, first, last in self._ranges(start, stop):
                if self.info.shards[index].masks_bytes:
                    begin = base + first - start
                    weights[begin : begin + last - first] = self._masks(index).weights(first, last, prefix)
        return weights

    def borders(self, start: int, stop: int) -> np.ndarray:
        """Return the borders of the documents that have tokens in [start, stop), ascending, int64: the first is at
        `start` or before, the last at `stop` or behind."""
        parts = [shard.borders(first, last) + base for shard, base, first, last in self._parts(start, stop)]
        return parts[0] if len(parts) == 1 else np.unique(np.concatenate(parts))

    def lengths(self) -> Iterator[np.ndarray]:
        """Yield the lengths of all documents in tokens, int64, in order, in arrays of bounded size."""
        for index in range(len(self.info.shards)):
            yield from self._shard(index).lengths()

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document in the stored type."""
        shard, document = self._shard_of(index)
        return self._shard(shard).document(document)

    def document_masks(self, index: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which of the first `length` tokens of a document are metadata, and which are masked, bool."""
        shard, document = self._shard_of(index)
        start, stop = self._shard(shard).offsets(document, document + 1).tolist()
        stop = min(stop, start + length)
        if not self.info.shards[shard].masks_bytes:
            return np.zeros(stop - start, dtype=bool), np.zeros(stop - start, dtype=bool)
        return self._masks(shard).prefixes(start, stop), self._masks(shard).masked(start, stop)

    def _shard_of(self, index: int) -> tuple[int, int]:
        """Return the shard of a document, and the document's number in it."""
        for place, shard in enumerate(self.info.shards):
            if index < shard.num_documents:
                return place, index
            index -= shard.num_documents
        raise IndexError(f"{self.folder} has {self.info.num_documents} documents")

    def verify(self) -> Iterator[int]:
        """Compare the checksums, and yield the bytes of each finished file. Raises DataError at a difference."""
        for shard in self.info.shards:
            for path, size, checksum in shard.files(self.folder):
                if file_checksum(path) != checksum:
                    raise DataError(f"{path} is damaged (checksum mismatch): {self._way_out()}")
                yield size

    def _parts(self, start: int, stop: int) -> Iterator[tuple[IndexedDataset, int, int, int]]:
        """Yield the shards that hold tokens [start, stop), each with its first token in the stream and with the range
        in it."""
        for index, base, first, last in self._ranges(start, stop):
            yield self._shard(index), base, first, last

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield the same, with the shards' numbers."""
        while start < stop:
            index = bisect_right(self._starts, start) - 1
            base, end = self._starts[index], min(stop, self._starts[index + 1])
            yield index, base, start - base, end - base
            start = end

    def _open(self, index: int) -> IndexedDataset:
        expected = self.info.shards[index]
        shard = IndexedDataset(self.folder / expected.name)
        if (shard.num_tokens, shard.num_documents) != (expected.num_tokens, expected.num_documents):
            raise DataError(
                f"{self.folder / expected.name}.idx has {shard.num_tokens} tokens in {shard.num_documents} documents, "
                f"source.json of {expected.num_tokens} in {expected.num_documents}: {self._way_out()}"
            )
        return shard

    def _open_masks(self, index: int) -> masks.ShardMasks:
        shard = self.info.shards[index]
        return masks.ShardMasks(self.folder / f"{shard.name}{masks.SUFFIX}", shard.num_tokens)

    def _outside(self, tokens_N: np.ndarray, place: str) -> DataError:
        low, high, most = int(tokens_N.min()), int(tokens_N.max()), self.info.max_token_id
        return DataError(
            f"{self.folder}: token id {low if low < 0 else high}{place} is outside of 0 … {most}, the ids that "
            f"{INFO_NAME} describes: check the shards with {typed('data', 'verify', self.folder)}"
        )

    def _way_out(self) -> str:
        command = f"steptron data {self.info.action} {self.info.spec} --out {shlex.quote(str(self.folder.parent))}"
        return f"copy it again, or remove {self.folder} and run `{command}`"


def source_folders(folder: Path) -> list[Path]:
    """Return the folder itself if it is a source, else the sources in it. Raises DataError if there is none."""
    found = sorted(path.parent for path in folder.glob(f"*/{INFO_NAME}") if not path.parent.name.startswith("."))
    if not found:
        read_info(folder)
        return [folder]
    return found


def describe_shard(
    prefix: Path, num_documents: int, num_tokens: int, num_prefix_tokens: int = 0, num_masked_tokens: int = 0
) -> ShardInfo:
    """Return the description of PREFIX.bin, PREFIX.idx and PREFIX.masks, with sizes and checksums. Reads the files."""
    bin_path, idx_path, masks_path = (Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx", masks.SUFFIX))
    has_masks = num_prefix_tokens + num_masked_tokens > 0
    return ShardInfo(
        name=prefix.name,
        num_documents=num_documents,
        num_tokens=num_tokens,
        bin_bytes=bin_path.stat().st_size,
        idx_bytes=idx_path.stat().st_size,
        bin_blake2b=file_checksum(bin_path),
        idx_blake2b=file_checksum(idx_path),
        num_prefix_tokens=num_prefix_tokens,
        num_masked_tokens=num_masked_tokens,
        masks_bytes=masks_path.stat().st_size if has_masks else 0,
        masks_blake2b=file_checksum(masks_path) if has_masks else "",
    )


def file_checksum(path: Path) -> str:
    """Return the 128-bit blake2b of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
