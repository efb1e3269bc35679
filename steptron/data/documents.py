"""Sources of documents: a spec on the command line becomes items, and an item reads its documents on request.

    file, folder, glob or `datasets` folder → opening.py: kind of each file → readers.py: items (pieces of bounded size,
    picklable) → documents() in some process

A text file is one document. Text files are read in an order shuffled by name, so that neighbours in a folder do not
stay neighbours in the shards. Records of JSON lines, Parquet, Arrow and datasets keep their order.
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from steptron.data.opening import Kind, NotReadable, find_kind, shown, why
from steptron.data.readers import Item, TextFile, Unread, arrow_items, dataset_items, json_items, parquet_items
from steptron.errors import DataError

_T = TypeVar("_T")
_READERS = {Kind.JSON_LINES: json_items, Kind.PARQUET: parquet_items, Kind.ARROW: arrow_items}
_CACHES = frozenset(["__pycache__"])
_DATASET_FILES = frozenset(["dataset_info.json", "state.json"])


def file_items(spec: str, text_field: str) -> tuple[list[Item], list[Unread]]:
    """Return the items of a file, a folder, a glob pattern, or a folder written by `datasets.save_to_disk`, and the
    files that are not read.

    A folder is searched without hidden files and Python's caches. Every other file in it is read or is in the second
    list. A file that is named by itself or by a pattern is read as text if it is nothing else. Raises DataError if
    nothing is found.
    """
    path = Path(spec)
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        names = ", ".join(shown(path / split) for split in splits)
        raise DataError(f"{shown(path)} holds several splits: name one of {names}")
    unread: list[Unread] = []
    if path.is_dir():
        found = _search(path, unread)
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in dict.fromkeys(glob.glob(spec, recursive=True)) if Path(name).is_file()]
    texts: set[Path] = set()
    records: list[tuple[Path, Callable[..., Iterable[Item]]]] = []
    for file in found:
        try:
            kind = None if file.is_dir() else find_kind(file, named=not path.is_dir())
        except NotReadable as error:
            unread.append(Unread(shown(file), str(error)))
        else:
            if kind is Kind.TEXT:
                texts.add(file)
            else:
                records.append((file, _READERS[kind] if kind else dataset_items))
    items: list[Item] = [TextFile(text, text.stat().st_size) for text in _shuffled(texts)]
    for file, reader in sorted(records, key=lambda record: record[0]):
        try:
            items += reader(file, text_field)
        except NotReadable as error:
            unread.append(Unread(shown(file), str(error)))
    if not items and not unread:
        raise DataError(
            f"{shown(spec)}: no documents found: give `demo`, a file or folder of text, JSON lines, Parquet or Arrow, "
            "or a pattern"
        )
    return items, sorted(unread, key=str)


def by_hash(things: Iterable[_T], name: Callable[[_T], str]) -> list[_T]:
    """Return the things in a shuffled order that depends on their names only."""
    return sorted(things, key=lambda thing: hashlib.blake2b(os.fsencode(name(thing))).digest())


def _shuffled(texts: set[Path]) -> list[Path]:
    root = os.path.commonpath([text.parent for text in texts]) if texts else ""
    return by_hash(sorted(texts), lambda text: text.relative_to(root).as_posix())


def _search(path: Path, unread: list[Unread]) -> list[Path]:
    """Return the files below a folder, and the folders of saved datasets. What cannot be opened goes to `unread`."""

    def failed(error: OSError) -> None:
        unread.append(Unread(shown(error.filename), f"cannot be opened ({why(error)}): leave it out"))

    found: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=failed):
        if _DATASET_FILES.issubset(names):
            found.append(Path(folder))
            folders.clear()
            continue
        for name in [name for name in folders if Path(folder, name).is_symlink() and not name.startswith(".")]:
            unread.append(Unread(shown(Path(folder, name)), "is a link to a folder: name the folder itself"))
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _CACHES]
        described = {"dataset_info.json"} if any(name.endswith(".arrow") for name in names) else set()
        found += (Path(folder, name) for name in names if not name.startswith(".") and name not in described)
    return found
