"""A part of a source: the items that one process turns into one shard.

    items → split → parts ─ spread over processes ─→ texts → encoder, filters, EOS → KEY.bin, KEY.idx, KEY.masks
                                                                        KEY.json (record), KEY.npy (marks of copies)

The parts depend on the inputs only, so any number of processes writes the same shards. KEY is a hash of a part's inputs
and rules: what an earlier build finished is found by it and taken.
"""

import dataclasses
import hashlib
import json
import os
import queue
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache, lru_cache
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from steptron.atomic import atomic_write
from steptron.data import filters, masks, tokenizer
from steptron.data.documents import check_unread
from steptron.data.fields import MarkedText
from steptron.data.megatron_format import IndexedWriter
from steptron.data.readers import Item, Unread
from steptron.data.source import ShardInfo, describe_shard, file_checksum
from steptron.errors import DataError

_PARTS = 16
_SMALLEST_PART, _LARGEST_PART = 2**20, 2**30
_ENCODED_AT_ONCE = 2**20
"""The number of characters that the tokenizer gets in one call."""
LISTED = 1000
"""The number of documents left out by a filter that a part lists, for each filter. All are counted."""
LISTED_CHARACTERS, LISTED_TOKENS = 200, 60
"""The length of their beginnings."""
_SUFFIXES = (".npy", masks.SUFFIX, ".bin", ".idx")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The rules by which a part becomes a shard."""

    tokenizer_path: Path
    """The tokenizer.json."""
    eos: str | None
    """The token at the end of each document. None means the one usual name that the tokenizer has."""
    skip_bad: int
    """The number of files and records of a source that may be left out."""
    num_unread: int
    """The number of files of the source that are left out."""
    drop_repeats: bool
    """If true, documents that repeat themselves are left out (filters.has_repeats)."""
    duplicates: str | None
    """The kind of copies of which KEY.npy keeps marks (filters.KINDS). None means no marks."""

    def origin(self, items: Sequence[Item], used: tokenizer.LoadedTokenizer, *more: str) -> str:
        """Return a hash of inputs and of how they are read. A second build knows by it what is done already."""
        lines = [*(item.origin for item in items), f"eos {used.eos_id}", *more]
        lines += ["without repeats"] if self.drop_repeats else []
        lines += [f"marks {self.duplicates}"] if self.duplicates else []
        # A file name that is not UTF-8 has surrogates in the place of its bytes.
        return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


class PartResult(NamedTuple):
    """A finished part."""

    shard: ShardInfo
    max_token_id: int
    num_text_bytes: int
    unread: tuple[Unread, ...]
    num_repeats: int
    """The number of documents that are left out because they repeat themselves."""
    repeats: tuple[str, ...]
    """The beginnings of the first LISTED of them."""


def split(items: Sequence[Item]) -> list[list[Item]]:
    """Return the items in runs of about equal size, one per shard."""
    size = sum(item.num_bytes for item in items) // _PARTS
    size = min(max(size, _SMALLEST_PART), _LARGEST_PART)
    parts: list[list[Item]] = []
    room = 0
    for item in items:
        if room <= 0:
            parts.append([])
            room = size
        parts[-1].append(item)
        room -= item.num_bytes
    return parts


def spread(
    function: Callable[..., Any], tasks: Sequence[tuple], workers: int, advance: Callable[[int], None]
) -> list[Any]:
    """Return function(*task, advance) of every task, in their order, from `workers` processes. The function reports the
    bytes that it has done to its last argument."""
    if min(workers, len(tasks)) <= 1:
        return [function(*task, advance) for task in tasks]
    context = get_context("spawn")
    with (
        # A socket in TMPDIR, the default, has a path of at most 107 bytes.
        SyncManager(("127.0.0.1", 0), ctx=context) as manager,
        ProcessPoolExecutor(min(workers, len(tasks)), context, _one_thread) as pool,
    ):
        done = manager.Queue()
        futures = [pool.submit(function, *task, done.put) for task in tasks]
        try:
            _follow(futures, done, advance)
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise DataError("a tokenising process was killed (out of memory?): try fewer --workers") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _follow(futures: Sequence[Future], done: queue.Queue, advance: Callable[[int], None]) -> None:
    """Pass the processes' progress on until all have ended or one has failed."""
    while True:
        finished, running = wait(futures, timeout=0.2)
        while not done.empty():
            advance(done.get())
        for future in finished:
            future.result()
        if not running:
            return


def _one_thread() -> None:
    # The processes are the parallelism; the tokenizer's own threads would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def process(part: Sequence[Item], prefix: Path, rules: Rules, advance: Callable[[int], None]) -> PartResult:
    """Return the shard of a part: the one that an earlier build left complete, or a new one.

    Processes may do the same part at the same time: each writes under a name of its own, and the last rename wins.
    Raises DataError when the part has more that is not read than the rules allow.
    """
    record = Path(f"{prefix}.json")
    try:
        values = json.loads(record.read_text())
        unread = tuple(Unread(**place) for place in values.pop("unread"))
        values |= {"shard": ShardInfo(**values["shard"]), "unread": unread, "repeats": tuple(values["repeats"])}
        result = PartResult(**values)
        complete = all(file_checksum(path) == checksum for path, _, checksum in result.shard.files(prefix.parent))
        if complete and (not rules.duplicates or Path(f"{prefix}.npy").is_file()):
            advance(sum(item.num_bytes for item in part))
            return result
    except (OSError, ValueError, TypeError, KeyError):
        pass  # absent, or not complete
    own = prefix.with_name(f".{prefix.name}.{secrets.token_hex(4)}")
    try:
        result = _write_shard(part, own, rules, advance)
        for suffix in _SUFFIXES:
            if Path(f"{own}{suffix}").is_file():
                Path(f"{own}{suffix}").replace(f"{prefix}{suffix}")
    finally:
        for suffix in _SUFFIXES:
            Path(f"{own}{suffix}").unlink(missing_ok=True)
    result = result._replace(shard=dataclasses.replace(result.shard, name=prefix.name))
    with atomic_write(record) as temporary:
        values = result._asdict() | {
            "shard": dataclasses.asdict(result.shard),
            "unread": [dataclasses.asdict(unread) for unread in result.unread],
        }
        temporary.write_text(json.dumps(values))
    return result


def _write_shard(part: Sequence[Item], prefix: Path, rules: Rules, advance: Callable[[int], None]) -> PartResult:
    """Tokenise one part into one shard. Each document ends with EOS."""
    used = load(rules.tokenizer_path, rules.eos)
    writer, masked = IndexedWriter(prefix, used.vocab_size), masks.MaskWriter()
    num_text_bytes = num_repeats = 0
    unread, repeats, marks = list[Unread](), list[str](), list[np.ndarray]()
    for texts in _batches(_documents(part, unread, rules, advance)):
        for text, encoding in zip(texts, _encoded(used.encoder, texts), strict=True):
            if rules.drop_repeats and filters.has_repeats(np.array(encoding.ids)):
                num_repeats += 1
                repeats += [text[:LISTED_CHARACTERS]] if len(repeats) < LISTED else []
                continue
            prefix_ids, hidden = _marks(text, encoding, used.encoder)
            masked.add_document(writer.num_tokens, len(prefix_ids), hidden.tokens_L)
            writer.add_document([*prefix_ids, *encoding.ids, used.eos_id])
            size = len(text.encode()) - hidden.num_bytes
            num_text_bytes += size
            if rules.duplicates:
                marks.append(np.array([size, *filters.signature(text, rules.duplicates)], dtype=np.uint64))
    writer.finish()
    masked.finish(Path(f"{prefix}{masks.SUFFIX}"))
    if rules.duplicates:
        width = 1 + filters.KINDS[rules.duplicates]
        np.save(f"{prefix}.npy", np.concatenate(marks or [np.empty(0, np.uint64)]).reshape(-1, width))
    counts = (writer.num_documents, writer.num_tokens, masked.num_prefix_tokens, masked.num_masked_tokens)
    shard = describe_shard(prefix, *counts)
    return PartResult(shard, writer.max_token_id, num_text_bytes, tuple(unread), num_repeats, tuple(repeats))


def _encoded(encoder: Tokenizer, texts: list[str]) -> list[Encoding]:
    """Return the tokens of the texts, with offsets if some text needs them."""
    has_spans = any(isinstance(text, MarkedText) and text.spans for text in texts)
    encode = encoder.encode_batch if has_spans else encoder.encode_batch_fast
    return encode(texts, add_special_tokens=False)


def _marks(text: str, encoding: Encoding, encoder: Tokenizer) -> tuple[Sequence[int], masks.Masked]:
    """Return the tokens of a document's prefix, and its masked tokens. The end is masked if the token before it is."""
    if not isinstance(text, MarkedText):
        return (), masks.Masked(np.zeros(len(encoding.ids) + 1, dtype=bool), 0)
    prefix_ids = _prefix_ids(encoder, text.prefix) if text.prefix else ()
    hidden = masks.masked_tokens(text, encoding.offsets if text.spans else (), text.spans)
    tokens_L = np.zeros(len(prefix_ids) + len(encoding.ids) + 1, dtype=bool)
    if text.spans:
        tokens_L[len(prefix_ids) :] = np.append(hidden.tokens_L, hidden.tokens_L[-1:])
    return prefix_ids, hidden._replace(tokens_L=tokens_L)


@lru_cache(maxsize=4096)
def _prefix_ids(encoder: Tokenizer, prefix: str) -> list[int]:
    """Return the tokens of a prefix. They do not depend on the text behind it, nor the text's tokens on them."""
    return encoder.encode(prefix, add_special_tokens=False).ids


@cache
def load(path: Path, eos: str | None) -> tokenizer.LoadedTokenizer:
    """Return a tokenizer, loaded once per process."""
    return tokenizer.load(path, eos)


def _documents(
    part: Sequence[Item], unread: list[Unread], rules: Rules, advance: Callable[[int], None]
) -> Iterator[str]:
    for item in part:
        for document in item.documents():
            if isinstance(document, str):
                yield document
            else:
                unread.append(document)
                check_unread(unread, rules.skip_bad, rules.num_unread)
        advance(item.num_bytes)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of texts of about _ENCODED_AT_ONCE characters."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _ENCODED_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
