"""The build: documents to shards of tokens, one process per part, under a temporary name until it is complete.

    spec → items (documents.py, demo.py) → parts of about equal size → processes: encode, end with EOS, write a shard
    spec → texts → tokenizer.train ─┘                                  shards + source.json → renamed into place

The parts depend on the inputs only, so any number of processes writes the same shards.
"""

import fcntl
import hashlib
import os
import queue
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Protocol

from steptron.atomic import atomic_folder, atomic_write
from steptron.data import tokenizer
from steptron.data.demo import demo_items
from steptron.data.documents import Item, file_items
from steptron.data.megatron_format import IndexedWriter
from steptron.data.source import INFO_NAME, ShardedSource, ShardInfo, SourceInfo, file_checksum
from steptron.errors import DataError

_PARTS = 16
_SMALLEST_PART, _LARGEST_PART = 2**20, 2**30
_TRAINING_BYTES = 64 * 2**20
"""The largest amount of text that a tokenizer is trained on, in bytes, taken evenly from all of the text."""
_ENCODED_AT_ONCE = 2**20
"""The number of characters that the tokenizer gets in one call."""


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """The arguments of `steptron data build`."""

    spec: str
    """The input: `demo`, or anything that documents.file_items takes."""
    out: Path
    """The folder of the tokenizer and of the sources."""
    name: str
    """The name of the source. `demo` names its own two."""
    tokenizer: Path | None
    """The tokenizer.json to use. None means the one in `out`, or a new one."""
    vocab_size: int | None
    """The vocabulary size that the tokenizer must have. None means default_vocab_size for a new one, and any for an
    existing one."""
    default_vocab_size: int
    """The vocabulary size of a new tokenizer if none is given."""
    eos: str | None
    """The token at the end of each document. None means a usual name."""
    text_field: str
    """The field of a record that holds its text."""
    workers: int
    """The number of processes."""


class BuildReporter(Protocol):
    """A receiver of the build's progress."""

    def begin(self, task: str, num_bytes: int) -> None: ...

    def advance(self, num_bytes: int) -> None: ...


class Built(NamedTuple):
    """One source after the build."""

    folder: Path
    info: SourceInfo
    is_new: bool


class _PartResult(NamedTuple):
    shard: ShardInfo
    max_token_id: int
    num_text_bytes: int


def build(request: BuildRequest, progress: BuildReporter) -> list[Built]:
    """Write the tokenizer and the sources into request.out. Existing sources from the same inputs are kept.

    Raises DataError if an input is missing or bad, a source holds no text, or the folder holds something else.
    """
    sources = demo_items() if request.spec == "demo" else {request.name: file_items(request.spec, request.text_field)}
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        with _alone(request.out):
            used = _tokenizer(request, list(sources.values()), progress)
            return [_source(request, name, items, used, progress) for name, items in sources.items()]
    except OSError as error:
        raise DataError(f"{request.out}: the build stopped, {error}; nothing unfinished was kept") from error


def _tokenizer(
    request: BuildRequest, sources: Sequence[Sequence[Item]], progress: BuildReporter
) -> tokenizer.LoadedTokenizer:
    """Return the given tokenizer, the one of the folder, or a new one. Afterwards it is the folder's."""
    path, given = request.out / "tokenizer.json", request.tokenizer
    if given and path.is_file() and tokenizer.tokenizer_hash(given) != tokenizer.tokenizer_hash(path):
        raise DataError(f"{path} is not --tokenizer {given}: the sources of a folder share one, give another --out")
    if not path.is_file():
        with atomic_write(path, durable=True) as temporary:
            if given:
                tokenizer.load(given, request.eos)
                shutil.copyfile(given, temporary)
            else:
                _train_tokenizer(request, sources, progress, temporary)
    used = tokenizer.load(path, request.eos)
    if request.vocab_size not in (None, used.vocab_size):
        raise DataError(
            f"--vocab-size={request.vocab_size}: {path} has {used.vocab_size} tokens and is kept: give another --out"
        )
    return used


def _train_tokenizer(
    request: BuildRequest, sources: Sequence[Sequence[Item]], progress: BuildReporter, path: Path
) -> None:
    """Train a tokenizer on the sources' text, and write it to `path`."""
    total = sum(item.num_bytes for items in sources for item in items)
    progress.begin("tokenizer", min(total, _TRAINING_BYTES))
    texts = filter(None, _training_texts(sources, progress.advance))
    first = next(texts, None)
    if first is None:
        raise DataError(_empty(request))
    tokenizer.train(chain([first], texts), request.vocab_size or request.default_vocab_size, path)


def _training_texts(sources: Sequence[Sequence[Item]], advance: Callable[[int], None]) -> Iterator[str]:
    """Yield documents of evenly spaced items, from each source in proportion to its size."""
    total = sum(item.num_bytes for items in sources for item in items)
    for items in sources:
        quota = min(1.0, _TRAINING_BYTES / max(total, 1)) * sum(item.num_bytes for item in items)
        every = -(-total // _TRAINING_BYTES) or 1
        for item in items[::every]:
            for text in item.documents():
                if quota <= 0:
                    break
                yield text
                quota -= len(text)
            advance(item.num_bytes)


def _source(
    request: BuildRequest, name: str, items: Sequence[Item], used: tokenizer.LoadedTokenizer, progress: BuildReporter
) -> Built:
    folder = request.out / name
    origin = _origin(items, used)
    if folder.exists():
        if not (folder / INFO_NAME).exists():
            raise DataError(f"{folder} exists and is not a source: give another --name or --out, or move it away")
        existing = ShardedSource(folder).info
        if (existing.origin, existing.tokenizer_hash) != (origin, used.hash):
            raise DataError(f"{folder} was built from other text: remove it to build it again, or give another --out")
        return Built(folder, existing, False)
    with atomic_folder(folder) as temporary:
        progress.begin(name, sum(item.num_bytes for item in items))
        results = _run(request, _parts(items), temporary, used, progress.advance)
        info = _info(request, origin, used, results)
        info.write(temporary)
    return Built(folder, info, True)


def _info(
    request: BuildRequest, origin: str, used: tokenizer.LoadedTokenizer, results: Sequence[_PartResult]
) -> SourceInfo:
    shards = tuple(result.shard for result in results)
    num_tokens = sum(shard.num_tokens for shard in shards)
    if not num_tokens:
        raise DataError(_empty(request))
    return SourceInfo(
        spec=request.spec,
        origin=origin,
        tokenizer_hash=used.hash,
        vocab_size=used.vocab_size,
        eos_id=used.eos_id,
        max_token_id=max(result.max_token_id for result in results),
        num_documents=sum(shard.num_documents for shard in shards),
        num_tokens=num_tokens,
        num_text_bytes=sum(result.num_text_bytes for result in results),
        shards=shards,
    )


def _empty(request: BuildRequest) -> str:
    return f"{request.spec}: not one document with text there, an empty source is not useful: give other files"


def _parts(items: Sequence[Item]) -> list[list[Item]]:
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


def _run(
    request: BuildRequest,
    parts: Sequence[Sequence[Item]],
    folder: Path,
    used: tokenizer.LoadedTokenizer,
    advance: Callable[[int], None],
) -> list[_PartResult]:
    """Process every part in some process. The results are in the order of the parts, so that shards do not depend on
    timing."""
    tasks = [(part, folder / f"shard-{index:05d}", used.path, request.eos) for index, part in enumerate(parts)]
    if min(request.workers, len(tasks)) <= 1:
        return [_write_shard(*task, advance) for task in tasks]
    context = get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(min(request.workers, len(tasks)), context, _one_thread) as pool,
    ):
        done = manager.Queue()
        futures = [pool.submit(_write_shard, *task, done.put) for task in tasks]
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


def _write_shard(
    part: Sequence[Item], prefix: Path, tokenizer_path: Path, eos: str | None, advance: Callable[[int], None]
) -> _PartResult:
    """Tokenise one part into one shard. Each document ends with EOS; documents without text are left out."""
    used = _load(tokenizer_path, eos)
    writer = IndexedWriter(prefix, used.vocab_size)
    num_text_bytes = 0
    for texts in _batches(_documents(part, advance)):
        for encoding in used.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            writer.add_document([*encoding.ids, used.eos_id])
        num_text_bytes += sum(len(text.encode()) for text in texts)
    writer.finish()
    (bin_path, bin_bytes), (idx_path, idx_bytes) = (
        (path, path.stat().st_size) for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))
    )
    shard = ShardInfo(
        name=prefix.name,
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
        bin_bytes=bin_bytes,
        idx_bytes=idx_bytes,
        bin_blake2b=file_checksum(bin_path),
        idx_blake2b=file_checksum(idx_path),
    )
    return _PartResult(shard, writer.max_token_id, num_text_bytes)


@cache
def _load(path: Path, eos: str | None) -> tokenizer.LoadedTokenizer:
    return tokenizer.load(path, eos)


def _documents(part: Sequence[Item], advance: Callable[[int], None]) -> Iterator[str]:
    for item in part:
        yield from filter(None, item.documents())
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


def _origin(items: Sequence[Item], used: tokenizer.LoadedTokenizer) -> str:
    """Return a hash of the inputs and of how they are read. A second build knows by it that there is nothing to do."""
    lines = [*(item.origin for item in items), f"eos {used.eos_id}"]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The system releases it when the process ends in any way."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another build is writing into {folder}: wait for it, or give another --out") from error
        yield
