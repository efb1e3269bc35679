"""Sources of documents: a spec on the command line becomes items, and an item reads its documents on request.

    file, folder, glob, list or `datasets` folder → opening.py: kind of each file → readers.py: items (pieces of
    bounded size, picklable) → documents() in some process

A text file is one document. Text files are read in an order shuffled by name, so that neighbours in a folder do not
stay neighbours in the shards. Records of JSON lines, Parquet, Arrow and datasets keep their order.
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from steptron.data.fields import PLAIN, Fields
from steptron.data.hub import PREFIX, hub_items
from steptron.data.mds import INDEX_NAME, is_mds, mds_items
from steptron.data.opening import Kind, NotReadable, find_kind, shown, why
from steptron.data.readers import Item, Unread, arrow_items, dataset_items, json_items, parquet_items, text_items
from steptron.data.remote import DEFAULT_CACHE, Cache, Remote, find_remote
from steptron.errors import DataError

_T = TypeVar("_T")
_READERS = {Kind.TEXT: text_items, Kind.JSON_LINES: json_items, Kind.PARQUET: parquet_items, Kind.ARROW: arrow_items}
_CACHES = frozenset(["__pycache__"])
_DATASET_FILES = frozenset(["dataset_info.json", "state.json"])


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, copied into the cache while its documents are read. Its kind shows only then."""

    remote: Remote
    cache: Cache
    fields: Fields

    @property
    def num_bytes(self) -> int:
        return self.remote.num_bytes

    @property
    def origin(self) -> str:
        return f"{self.remote.url} {self.remote.version} {self.fields.origin}"

    def documents(self) -> Iterator[str | Unread]:
        try:
            with self.cache.opened(self.remote) as path:
                for document in _documents(path, self.remote.named, self.fields):
                    if isinstance(document, Unread):
                        place = document.place.replace(shown(path), shown(self.remote.url))
                        document = Unread(place, document.reason)
                    yield document
        except DataError:
            raise
        except Exception as error:  # each file system raises errors of its own
            yield Unread(shown(self.remote.url), f"cannot be fetched ({why(error)}): try again, or leave it out")


def file_items(
    specs: Sequence[str], fields: Fields = PLAIN, cache: Cache = DEFAULT_CACHE
) -> tuple[list[Item], list[Unread]]:
    """Return the items of the inputs, and the files that are not read.

    Each of `specs` is a file, a folder, a glob pattern, a folder of a dataset (`save_to_disk`, MDS), a URL that fsspec
    opens, `datasets:NAME` of the Hub, or `@FILE`, a file that lists such inputs. A folder, also one that a pattern
    matches, is searched without hidden files and Python's caches. Every other file in it is read or is in the second
    list. A file that is named by itself or by a pattern is read as text if it is nothing else. A file that is found
    twice is read once. Raises DataError if nothing is found.
    """
    specs = [one for spec in specs for one in _listed(spec)]
    unread: list[Unread] = []
    texts: set[Path] = set()
    records: list[tuple[Path, Callable[[Path, Fields], Iterable[Item]]]] = []
    local = [spec for spec in specs if "://" not in spec and not spec.startswith(PREFIX)]
    for file, named in _found(local, unread).items():
        try:
            reader = _reader(file, named)
        except NotReadable as error:
            unread.append(Unread(shown(file), str(error)))
        else:
            if reader is text_items:
                texts.add(file)
            else:
                records.append((file, reader))
    items: list[Item] = [item for text in _shuffled(texts) for item in text_items(text, fields)]
    for file, reader in sorted(records, key=lambda record: record[0]):
        try:
            items += reader(file, fields)
        except NotReadable as error:
            unread.append(Unread(shown(file), str(error)))
    remote = {file.url: file for spec in specs if "://" in spec for file in find_remote(spec)}
    items += (RemoteFile(file, cache, fields) for _, file in sorted(remote.items()))
    for spec in sorted({spec for spec in specs if spec.startswith(PREFIX)}):
        items += hub_items(spec, fields)
    return items, sorted(set(unread), key=str)


def _listed(spec: str) -> list[str]:
    """Return the inputs that a spec `@FILE` lists, one per line, or the spec itself if it is of another kind.

    Paths are relative to the file's folder; empty lines and those that begin with # do not count. Raises DataError.
    """
    path = Path(spec.removeprefix("@"))
    if not spec.startswith("@") or Path(spec).exists():
        return [spec]
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise DataError(f"{shown(spec)}: the list cannot be read ({why(error)}): give a file of inputs") from error
    found: list[str] = []
    for number, line in enumerate(lines, start=1):
        entry = os.fsdecode(line.strip())
        if not entry or entry.startswith("#"):
            continue
        if "://" not in entry and not entry.startswith(PREFIX):
            entry = os.path.join(path.parent, entry)
            if not Path(entry).exists() and not glob.glob(entry, recursive=True):
                raise DataError(f"{shown(path)}, line {number}: {shown(entry)} does not exist: fix or remove the line")
        found.append(entry)
    if not found:
        raise DataError(f"{shown(spec)}: the list has no inputs: write one per line")
    return found


def _reader(file: Path, named: bool) -> Callable[[Path, Fields], Iterable[Item]]:
    """Return the function that makes items of a file or of a dataset's folder. Raises NotReadable."""
    if file.is_dir():
        return mds_items if is_mds(file) else dataset_items
    return _READERS[find_kind(file, named)]


def _documents(file: Path, named: bool, fields: Fields) -> Iterator[str | Unread]:
    """Yield the documents of one file."""
    try:
        items = list(_reader(file, named)(file, fields))
    except NotReadable as error:
        yield Unread(shown(file), str(error))
    else:
        for item in items:
            yield from item.documents()


def by_hash(things: Iterable[_T], name: Callable[[_T], str]) -> list[_T]:
    """Return the things in a shuffled order that depends on their names only."""
    return sorted(things, key=lambda thing: hashlib.blake2b(os.fsencode(name(thing))).digest())


def _shuffled(texts: set[Path]) -> list[Path]:
    root = os.path.commonpath([text.parent.absolute() for text in texts]) if texts else ""
    return by_hash(sorted(texts), lambda text: text.absolute().relative_to(root).as_posix())


def check_unread(unread: Sequence[Unread], skip_bad: int, elsewhere: int = 0) -> None:
    """Raise DataError if more is not read, here and `elsewhere`, than the user accepts."""
    if len(unread) + elsewhere > skip_bad:
        count = f"{len(unread)} inputs are not read, the first: " if len(unread) > 1 else ""
        limit = f"more than --skip-bad={skip_bad}" if skip_bad else "or leave out up to N inputs with --skip-bad N"
        raise DataError(f"{count}{unread[0]}; {limit}")


def _found(specs: Sequence[str], unread: list[Unread]) -> dict[Path, bool]:
    """Return the files and saved datasets of the inputs, and whether each is named by itself or by a pattern."""
    found: dict[Path, bool] = {}
    for spec in specs:
        before = len(unread)
        matches = [Path(spec)] if Path(spec).exists() else [Path(name) for name in glob.glob(spec, recursive=True)]
        files = {match: True for match in matches if not match.is_dir()}
        for folder in (match for match in matches if match.is_dir()):
            files |= {file: False for file in _search(folder, unread) if file not in files}
        if not files and len(unread) == before:
            raise DataError(
                f"{shown(spec)}: no documents found: give `demo`, a file or folder of text, JSON lines, Parquet or "
                f"Arrow, a pattern, a URL, or {PREFIX}NAME for a dataset of the Hugging Face Hub"
            )
        found |= {file: named or found.get(file, False) for file, named in files.items()}
    same: dict[Path, Path] = {}
    for file in found:
        same.setdefault(file.resolve(), file)
    return {file: found[file] for file in same.values()}


def _search(path: Path, unread: list[Unread]) -> list[Path]:
    """Return the files below a folder and the folders of datasets. What cannot be opened goes to `unread`."""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        names = ", ".join(shown(path / split) for split in splits)
        raise DataError(f"{shown(path)} holds several splits: name one of {names}")

    def failed(error: OSError) -> None:
        unread.append(Unread(shown(error.filename), f"cannot be opened ({why(error)}): leave it out"))

    found: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=failed):
        if _DATASET_FILES.issubset(names) or (INDEX_NAME in names and is_mds(Path(folder))):
            found.append(Path(folder))
            folders.clear()
            continue
        for name in [name for name in folders if Path(folder, name).is_symlink() and not name.startswith(".")]:
            unread.append(Unread(shown(Path(folder, name)), "is a link to a folder: name the folder itself"))
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _CACHES]
        described = {"dataset_info.json"} if any(name.endswith(".arrow") for name in names) else set()
        found += (Path(folder, name) for name in names if not name.startswith(".") and name not in described)
    return found
