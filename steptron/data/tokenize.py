"""The build: documents to shards of tokens, one process per part, under a temporary name until it is complete.

    inputs → items (documents.py, demo.py) → parts (parts.py) → processes: encode, end with EOS, write a shard
                │                                                shards + source.json → renamed into place
                └→ a sample → tokenizer_training.py → tokenizer.json

A finished part waits in .parts-NAME: a build that was ended takes it from there when it is started again, and so does a
build that joins what others built with --shard.
"""

import dataclasses
import errno
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol

from steptron.atomic import atomic_folder, atomic_write
from steptron.data import duplicates, hold_out, parts, tokenizer
from steptron.data.demo import demo_items
from steptron.data.documents import check_unread, file_items
from steptron.data.fields import Fields
from steptron.data.filters import check_kind
from steptron.data.opening import as_typed
from steptron.data.readers import Item, Unread
from steptron.data.remote import DEFAULT_CACHE, Cache
from steptron.data.source import DROPPED_NAME, INFO_NAME, ShardedSource, SourceInfo
from steptron.data.tokenizer_training import train_on
from steptron.errors import DataError


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """The arguments of `steptron data build`."""

    specs: tuple[str, ...]
    """The inputs: `demo` alone, or anything that documents.file_items takes."""
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
    fields: Fields
    """The fields of a record that make a document."""
    skip_bad: int
    """The number of files and records that may be left out of a source because they cannot be read or are empty."""
    workers: int
    """The number of processes."""
    cache: Cache = DEFAULT_CACHE
    """The copies of files behind URLs."""
    drop_repeats: bool = False
    """If true, documents that repeat themselves are left out (filters.has_repeats)."""
    drop_duplicates: str | None = None
    """The kind of copies (filters.KINDS) of which a source keeps only the first. None keeps all."""
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


class BuiltParts(NamedTuple):
    """The parts of one source that `build_parts` built."""

    folder: Path
    """The source's folder, which `build` makes of all parts."""
    num_built: int
    num_parts: int


def build(request: BuildRequest, progress: BuildReporter) -> list[Built]:
    """Write the tokenizer and the sources into request.out. Existing sources from the same inputs are kept.

    Raises DataError if an input is missing, more than request.skip_bad inputs of a source are not read, a source holds
    no text, or the folder holds something else.
    """
    trained, held_out, unread = _inputs(request)
    with _writing(request.out):
        used = _tokenizer(request, trained, progress)
        # An empty held-out side, as of a small share, is an error: it is known before the rest is built.
        done = [_source(request, name, items, [], used, progress) for name, items in held_out.items()]
        done += [_source(request, name, items, unread, used, progress) for name, items in trained.items()]
        return sorted(done, key=lambda built: built.folder.name in held_out)


def build_parts(request: BuildRequest, index: int, count: int, progress: BuildReporter) -> list[BuiltParts]:
    """Build every count-th part of the sources, from part `index` on. `build` joins the parts of all indices.

    Several processes, on several machines, may do so at the same time. Raises DataError as `build` does, and if there
    is no tokenizer yet.
    """
    trained, held_out, unread = _inputs(request)
    path = request.out / "tokenizer.json"
    if not request.tokenizer and not path.is_file():
        raise DataError(
            f"--shard={index}/{count}: there is no {path}, and builds side by side cannot train one: train it first "
            "with `steptron data tokenizer`, or give --tokenizer"
        )
    with _writing(request.out, fcntl.LOCK_SH):
        used = _tokenizer(request, {}, progress)
        done = []
        for name, items in {**held_out, **trained}.items():
            every = parts.split(items)
            chosen = [] if (request.out / name).exists() else every[index::count]
            folder = _parts_folder(request, name)
            rules = _rules(request, used, len(unread) if name in trained else 0)
            progress.begin(name, sum(item.num_bytes for part in chosen for item in part))
            tasks = [(part, folder / rules.origin(part, used, used.hash), rules) for part in chosen]
            parts.spread(parts.process, tasks, request.workers, progress.advance)
            done.append(BuiltParts(request.out / name, len(chosen), len(every)))
        return done


def _inputs(request: BuildRequest) -> tuple[hold_out.Sources, hold_out.Sources, list[Unread]]:
    """Return the items to train on and those held out, by source, and the files that are not read."""
    check_kind(request.drop_duplicates)
    unread: list[Unread] = []
    if request.specs == ("demo",):
        sources = demo_items(request.fields)
    else:
        items, unread = file_items(request.specs, request.fields, request.cache)
        sources = {request.name: items}
    check_unread(unread, request.skip_bad)
    return *hold_out.split(sources, request.hold_out), unread


def _rules(request: BuildRequest, used: tokenizer.LoadedTokenizer, num_unread: int) -> parts.Rules:
    return parts.Rules(
        tokenizer_path=used.path,
        eos=request.eos,
        skip_bad=request.skip_bad,
        num_unread=num_unread,
        drop_repeats=request.drop_repeats,
        duplicates=request.drop_duplicates,
    )


def _parts_folder(request: BuildRequest, name: str) -> Path:
    folder = request.out / f".parts-{name}"
    folder.mkdir(exist_ok=True)
    return folder


def _tokenizer(
    request: BuildRequest, sources: Mapping[str, Sequence[Item]], progress: BuildReporter
) -> tokenizer.LoadedTokenizer:
    """Return the given tokenizer, the one of the folder, or a new one. Afterwards it is the folder's."""
    path = request.out / "tokenizer.json"
    if request.tokenizer:
        tokenizer.put(request.tokenizer, path, request.eos)
    elif not path.is_file():
        size = request.vocab_size or request.default_vocab_size
        with atomic_write(path, durable=True) as temporary:
            taken, unread = train_on(sources, None, size, temporary, progress.begin, progress.advance)
            if not any(taken.values()):
                check_unread(unread, request.skip_bad)
                raise DataError(_empty(request))
    used = tokenizer.load(path, request.eos)
    if request.vocab_size not in (None, used.vocab_size):
        raise DataError(
            f"--vocab-size={request.vocab_size}: {path} has {used.vocab_size} tokens and is kept: give another --out"
        )
    return used


def _source(
    request: BuildRequest,
    name: str,
    items: Sequence[Item],
    unread: Sequence[Unread],
    used: tokenizer.LoadedTokenizer,
    progress: BuildReporter,
) -> Built:
    folder = request.out / name
    rules = _rules(request, used, len(unread))
    origin = rules.origin(items, used)
    if folder.exists():
        if not (folder / INFO_NAME).exists():
            raise DataError(f"{folder} exists and is not a source: give another --name or --out, or move it away")
        existing = ShardedSource(folder).info
        if (existing.origin, existing.tokenizer_hash) != (origin, used.hash):
            raise DataError(
                f"{folder} was built from other text or by other rules: remove it to build it again, "
                "or give another --out"
            )
        check_unread(existing.unread, request.skip_bad)
        return Built(folder, existing, False)
    parts_folder = _parts_folder(request, name)
    tasks = [(part, parts_folder / rules.origin(part, used, used.hash), rules) for part in parts.split(items)]
    progress.begin(name, sum(item.num_bytes for item in items))
    try:
        results = parts.spread(parts.process, tasks, request.workers, progress.advance)
        kept, copies = results, list[str]()
        if rules.duplicates:
            kept, copies = duplicates.drop(parts_folder, results, rules, request.workers, progress.advance)
        info = _info(request, origin, used, unread, kept)
        dropped = _dropped(rules, results, info.num_documents)
        info = dataclasses.replace(info, dropped=dropped, **hold_out.recorded(items, request.fields.marks))
        check_unread(info.unread, request.skip_bad)
        with atomic_folder(folder) as temporary:
            for result, shard in zip(kept, info.shards, strict=True):
                for path, _, _ in result.shard.files(parts_folder):
                    path.rename(temporary / (shard.name + path.suffix))
            if any(dropped.values()):
                repeats = [text for result in results for text in result.repeats]
                _list_dropped(temporary / DROPPED_NAME, {"repeats": repeats, "duplicate": copies})
            info.write(temporary)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a full disk needs the room
            shutil.rmtree(parts_folder, ignore_errors=True)
        raise
    except BaseException:
        if not any(parts_folder.glob("*.json")):
            shutil.rmtree(parts_folder, ignore_errors=True)
        raise
    shutil.rmtree(parts_folder)
    return Built(folder, info, True)


def _dropped(rules: parts.Rules, results: Sequence[parts.PartResult], num_kept: int) -> dict[str, int]:
    """Return the number of documents that each filter in use left out."""
    num_built = sum(result.shard.num_documents for result in results)
    repeats = {"repeats": sum(result.num_repeats for result in results)} if rules.drop_repeats else {}
    return repeats | ({f"{rules.duplicates} duplicates": num_built - num_kept} if rules.duplicates else {})


def _list_dropped(path: Path, beginnings: Mapping[str, Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for reason, texts in beginnings.items():
            file.writelines(json.dumps({"reason": reason, "text": text}, ensure_ascii=False) + "\n" for text in texts)


def _info(
    request: BuildRequest,
    origin: str,
    used: tokenizer.LoadedTokenizer,
    unread: Sequence[Unread],
    results: Sequence[parts.PartResult],
) -> SourceInfo:
    names = (f"shard-{index:05d}" for index in range(len(results)))
    shards = tuple(dataclasses.replace(result.shard, name=name) for result, name in zip(results, names, strict=True))
    num_tokens = sum(shard.num_tokens for shard in shards)
    if not num_tokens:
        raise DataError(_empty(request))
    return SourceInfo(
        spec=as_typed(request.specs),
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
    inputs = as_typed(request.specs)
    if request.hold_out:
        return (
            f"{inputs}: --hold-out={request.hold_out} leaves one of the two sources without a document: "
            "give another fraction, or more documents"
        )
    return f"{inputs}: not one document with text there, an empty source is not useful: give other files"


@contextmanager
def _writing(folder: Path, lock: int = fcntl.LOCK_EX) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, lock):
            yield
    except OSError as error:
        raise DataError(f"{folder}: the build stopped, {error}; nothing unfinished was kept") from error


@contextmanager
def locked(folder: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold the folder's lock, alone or shared. The system releases it when the process ends in any way."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
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
