"""The build: documents to shards of tokens, one process per part, under a temporary name until it is complete.

    spec → items (documents.py, demo.py) → parts of about equal size → processes: encode, end with EOS, write a shard
    spec → texts → tokenizer.train ─┘                                  shards + source.json → renamed into place

The parts depend on the inputs only, so any number of processes writes the same shards. A finished part waits in
.parts-NAME under a hash of its inputs: a build that was ended takes it from there when it is started again.
"""

import dataclasses
import errno
import fcntl
import hashlib
import json
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
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import NamedTuple, Protocol

from steptron.atomic import atomic_folder, atomic_write
from steptron.data import hold_out, tokenizer
from steptron.data.demo import demo_items
from steptron.data.documents import file_items
from steptron.data.megatron_format import IndexedWriter
from steptron.data.opening import shown
from steptron.data.readers import Item, Unread
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
    """The token at the end of each document. None means the one usual name that the tokenizer has."""
    text_field: str
    """The field of a record that holds its text. "a.b" is the field b of the object a."""
    skip_bad: int
    """The number of files and records that may be left out of a source because they cannot be read or are empty."""
    workers: int
    """The number of processes."""
    hold_out: float = 0.0
    """The share of the documents that a source of its own holds, for evaluation. 0 holds out none."""


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
    unread: tuple[Unread, ...]


def build(request: BuildRequest, progress: BuildReporter) -> list[Built]:
    """Write the tokenizer and the sources into request.out. Existing sources from the same inputs are kept.

    Raises DataError if an input is missing, more than request.skip_bad inputs of a source are not read, a source holds
    no text, or the folder holds something else.
    """
    unread: list[Unread] = []
    if request.spec == "demo":
        sources = demo_items()
    else:
        items, unread = file_items(request.spec, request.text_field)
        sources = {request.name: items}
    _check_unread(unread, request.skip_bad)
    trained, held_out = hold_out.split(sources, request.hold_out)
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        with _alone(request.out):
            used = _tokenizer(request, list(trained.values()), progress)
            # An empty held-out side, as of a small share, is an error: it is known before the rest is built.
            done = [_source(request, name, items, [], used, progress) for name, items in held_out.items()]
            done += [_source(request, name, items, unread, used, progress) for name, items in trained.items()]
            return sorted(done, key=lambda built: built.folder.name in held_out)
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
                if isinstance(text, str):
                    yield text
                    quota -= len(text)
            advance(item.num_bytes)


def _source(
    request: BuildRequest,
    name: str,
    items: Sequence[Item],
    unread: Sequence[Unread],
    used: tokenizer.LoadedTokenizer,
    progress: BuildReporter,
) -> Built:
    folder = request.out / name
    origin = _origin(items, used)
    if folder.exists():
        if not (folder / INFO_NAME).exists():
            raise DataError(f"{folder} exists and is not a source: give another --name or --out, or move it away")
        existing = ShardedSource(folder).info
        if (existing.origin, existing.tokenizer_hash) != (origin, used.hash):
            raise DataError(f"{folder} was built from other text: remove it to build it again, or give another --out")
        _check_unread(existing.unread, request.skip_bad)
        return Built(folder, existing, False)
    parts_folder = request.out / f".parts-{name}"
    parts_folder.mkdir(exist_ok=True)
    parts = _parts(items)
    progress.begin(name, sum(item.num_bytes for item in items))
    try:
        results = _run(request, parts, parts_folder, len(unread), used, progress.advance)
        info = dataclasses.replace(_info(request, origin, used, unread, results), **hold_out.recorded(items))
        _check_unread(info.unread, request.skip_bad)
        with atomic_folder(folder) as temporary:
            for part, shard in zip(parts, info.shards, strict=True):
                for suffix in (".bin", ".idx"):
                    (parts_folder / (_part_key(part, used) + suffix)).rename(temporary / (shard.name + suffix))
            info.write(temporary)
    except OSError:
        shutil.rmtree(parts_folder, ignore_errors=True)  # a full disk needs the room
        raise
    except BaseException:
        if not any(parts_folder.glob("*.json")):
            shutil.rmtree(parts_folder, ignore_errors=True)
        raise
    shutil.rmtree(parts_folder)
    return Built(folder, info, True)


def _check_unread(unread: Sequence[Unread], skip_bad: int, elsewhere: int = 0) -> None:
    """Raise DataError if more is not read, here and `elsewhere`, than the user accepts."""
    if len(unread) + elsewhere > skip_bad:
        count = f"{len(unread)} inputs are not read, the first: " if len(unread) > 1 else ""
        limit = f"more than --skip-bad={skip_bad}" if skip_bad else "or leave out up to N inputs with --skip-bad N"
        raise DataError(f"{count}{unread[0]}; {limit}")


def _info(
    request: BuildRequest,
    origin: str,
    used: tokenizer.LoadedTokenizer,
    unread: Sequence[Unread],
    results: Sequence[_PartResult],
) -> SourceInfo:
    names = (f"shard-{index:05d}" for index in range(len(results)))
    shards = tuple(dataclasses.replace(result.shard, name=name) for result, name in zip(results, names, strict=True))
    num_tokens = sum(shard.num_tokens for shard in shards)
    if not num_tokens:
        raise DataError(_empty(request))
    return SourceInfo(
        spec=shown(request.spec),
        origin=origin,
        tokenizer_hash=used.hash,
        vocab_size=used.vocab_size,
        eos_id=used.eos_id,
        eos=used.eos,
        max_token_id=max(result.max_token_id for result in results),
        num_documents=sum(shard.num_documents for shard in shards),
        num_tokens=num_tokens,
        num_text_bytes=sum(result.num_text_bytes for result in results),
        unread=(*unread, *chain.from_iterable(result.unread for result in results)),
        shards=shards,
    )


def _empty(request: BuildRequest) -> str:
    if request.hold_out:
        return (
            f"{shown(request.spec)}: --hold-out={request.hold_out} leaves one of the two sources without a document: "
            "give another fraction, or more documents"
        )
    return f"{shown(request.spec)}: not one document with text there, an empty source is not useful: give other files"


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
    num_unread: int,
    used: tokenizer.LoadedTokenizer,
    advance: Callable[[int], None],
) -> list[_PartResult]:
    """Process every part in some process. The results are in the order of the parts, so that shards do not depend on
    timing."""
    limit = (request.skip_bad, num_unread)
    tasks = [(part, folder / _part_key(part, used), used.path, request.eos, limit) for part in parts]
    if min(request.workers, len(tasks)) <= 1:
        return [_part(*task, advance) for task in tasks]
    context = get_context("spawn")
    with (
        # A socket in TMPDIR, the default, has a path of at most 107 bytes.
        SyncManager(("127.0.0.1", 0), ctx=context) as manager,
        ProcessPoolExecutor(min(request.workers, len(tasks)), context, _one_thread) as pool,
    ):
        done = manager.Queue()
        futures = [pool.submit(_part, *task, done.put) for task in tasks]
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


def _part_key(part: Sequence[Item], used: tokenizer.LoadedTokenizer) -> str:
    return _origin(part, used, used.hash)


def _part(
    part: Sequence[Item],
    prefix: Path,
    tokenizer_path: Path,
    eos: str | None,
    limit: tuple[int, int],
    advance: Callable[[int], None],
) -> _PartResult:
    """Return the shard of a part: the one that an earlier build left complete, or a new one."""
    record = Path(f"{prefix}.json")
    try:
        values = json.loads(record.read_text())
        result = _PartResult(
            ShardInfo(**values["shard"]),
            values["max_token_id"],
            values["num_text_bytes"],
            tuple(Unread(**unread) for unread in values["unread"]),
        )
        if all(file_checksum(path) == checksum for path, _, checksum in result.shard.files(prefix.parent)):
            advance(sum(item.num_bytes for item in part))
            return result
    except (OSError, ValueError, TypeError, KeyError):
        pass  # absent, or not complete
    result = _write_shard(part, prefix, tokenizer_path, eos, limit, advance)
    with atomic_write(record) as temporary:
        values = result._asdict() | {
            "shard": dataclasses.asdict(result.shard),
            "unread": [dataclasses.asdict(unread) for unread in result.unread],
        }
        temporary.write_text(json.dumps(values))
    return result


def _write_shard(
    part: Sequence[Item],
    prefix: Path,
    tokenizer_path: Path,
    eos: str | None,
    limit: tuple[int, int],
    advance: Callable[[int], None],
) -> _PartResult:
    """Tokenise one part into one shard. Each document ends with EOS.

    `limit` is --skip-bad and the number of files that are not read. Raises DataError when the part exceeds it.
    """
    used = _load(tokenizer_path, eos)
    writer = IndexedWriter(prefix, used.vocab_size)
    num_text_bytes = 0
    unread: list[Unread] = []
    for texts in _batches(_documents(part, unread, limit, advance)):
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
    return _PartResult(shard, writer.max_token_id, num_text_bytes, tuple(unread))


@cache
def _load(path: Path, eos: str | None) -> tokenizer.LoadedTokenizer:
    return tokenizer.load(path, eos)


def _documents(
    part: Sequence[Item], unread: list[Unread], limit: tuple[int, int], advance: Callable[[int], None]
) -> Iterator[str]:
    for item in part:
        for document in item.documents():
            if isinstance(document, str):
                yield document
            else:
                unread.append(document)
                _check_unread(unread, *limit)
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


def _origin(items: Sequence[Item], used: tokenizer.LoadedTokenizer, *more: str) -> str:
    """Return a hash of the inputs and of how they are read. A second build knows by it that there is nothing to do."""
    lines = [*(item.origin for item in items), f"eos {used.eos_id}", *more]
    # A file name that is not UTF-8 has surrogates in the place of its bytes.
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The system releases it when the process ends in any way."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise DataError(
                    f"another build is writing into {folder}: wait for it, or give another --out"
                ) from error
            raise DataError(
                f"{folder} is on a file system without locks ({error.strerror}): mount it with locks "
                "(NFS: without nolock; Lustre: flock), or give another --out"
            ) from error
        yield
