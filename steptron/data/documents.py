"""Sources of documents: a spec on the command line becomes items, and an item reads its documents on request.

    file, folder, glob or `datasets` folder → items (pieces of bounded size, picklable) → documents() in some process

A text file is one document. Text files are read in an order shuffled by name, so that neighbours in a folder do not
stay neighbours in the shards. Records of JSONL, Parquet and datasets keep their order.
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

from steptron.errors import DataError

_TEXT_SUFFIXES = frozenset(
    [
        ".txt",
        ".md",
        ".rst",
        ".tex",
        ".html",
        ".xml",
        ".py",
        ".pyi",
        ".ipynb",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cu",
        ".java",
        ".kt",
        ".scala",
        ".js",
        ".ts",
        ".jsx",
        ".tsx",
        ".css",
        ".go",
        ".rs",
        ".rb",
        ".php",
        ".swift",
        ".lua",
        ".r",
        ".jl",
        ".hs",
        ".ml",
        ".sql",
        ".sh",
        ".pl",
        ".toml",
        ".yaml",
        ".yml",
    ]
)
_JSON_SUFFIXES = frozenset([".jsonl", ".ndjson"])
_PIECE = 16 * 2**20
"""The bytes of JSONL or of a dataset in one item."""


class Item(Protocol):
    """A piece of a source that one call reads."""

    @property
    def num_bytes(self) -> int:
        """Return the approximate number of bytes of text."""
        ...

    @property
    def origin(self) -> str:
        """Return a text that identifies the input and changes when the input changes."""
        ...

    def documents(self) -> Iterator[str]: ...


_T = TypeVar("_T")


@dataclass(frozen=True)
class TextFile:
    """A whole file, UTF-8, as one document."""

    path: Path
    num_bytes: int

    @property
    def origin(self) -> str:
        return _stamp(self.path)

    def documents(self) -> Iterator[str]:
        try:
            yield self.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8 at byte {error.start}: convert it or leave it out") from error


@dataclass(frozen=True)
class JsonLines:
    """The lines of a JSONL file that begin in bytes [start, stop), one document each."""

    path: Path
    start: int
    stop: int
    text_field: str

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    @property
    def origin(self) -> str:
        return f"{_stamp(self.path)} {self.start} {self.text_field}"

    def documents(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            if self.start:
                # The line that holds the byte before `start` belongs to the piece before.
                file.seek(self.start - 1)
                file.readline()
            while (position := file.tell()) < self.stop:
                line = file.readline()
                if line.strip():
                    yield self._text(line, f"{self.path}, the line at byte {position}")

    def _text(self, line: bytes, place: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: not JSON ({error}): fix the line or leave it out") from error
        if not isinstance(record, dict):
            raise DataError(f"{place}: must be a JSON object, not a {type(record).__name__}")
        return _field(record, self.text_field, place)


@dataclass(frozen=True)
class ParquetGroup:
    """One row group of a Parquet file, with one document per row."""

    path: Path
    group: int
    num_bytes: int
    text_field: str

    @property
    def origin(self) -> str:
        return f"{_stamp(self.path)} {self.group} {self.text_field}"

    def documents(self) -> Iterator[str]:
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(self.path) as file:
            for batch in file.iter_batches(batch_size=256, row_groups=[self.group], columns=[self.text_field]):
                for record in batch.to_pylist():
                    yield _field(record, self.text_field, f"{self.path}, row group {self.group}")


@dataclass(frozen=True)
class DatasetRows:
    """Rows [start, stop) of a dataset that `datasets` saved to disk, with one document per row."""

    path: Path
    start: int
    stop: int
    num_bytes: int
    text_field: str

    @property
    def origin(self) -> str:
        return f"{_stamp(self.path / 'state.json')} {self.start} {self.text_field}"

    def documents(self) -> Iterator[str]:
        import datasets

        rows = datasets.Dataset.load_from_disk(str(self.path)).select_columns(self.text_field)
        for row in range(self.start, self.stop):
            yield _field(dict(rows[row]), self.text_field, f"{self.path}, row {row}")


def file_items(spec: str, text_field: str) -> list[Item]:
    """Return the items of a file, a folder, a glob pattern, or a folder written by `datasets.save_to_disk`.

    A folder is searched for text, source code, JSONL and Parquet by suffix, without hidden files. A file or a pattern
    is taken as it is named. Raises DataError if nothing is found.
    """
    path = Path(spec)
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise DataError(f"{path} holds several splits: name one of {', '.join(str(path / split) for split in splits)}")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return list(_dataset_items(path, text_field))
    if path.is_dir():
        found = [file for file in path.rglob("*") if _is_known(file.relative_to(path)) and file.is_file()]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(spec, recursive=True) if Path(name).is_file()]
    if not found:
        raise DataError(
            f"{spec}: no documents found: give `demo`, a file or folder of text, JSONL or Parquet, or a pattern"
        )
    records = [file for file in found if file.suffix in _JSON_SUFFIXES | {".parquet"}]
    texts = sorted(set(found) - set(records))
    root = os.path.commonpath([text.parent for text in texts]) if texts else ""
    texts = by_hash(texts, lambda text: text.relative_to(root).as_posix())
    return [
        *(TextFile(text, text.stat().st_size) for text in texts),
        *(item for file in sorted(records) for item in _record_items(file, text_field)),
    ]


def by_hash(things: Iterable[_T], name: Callable[[_T], str]) -> list[_T]:
    """Return the things in a shuffled order that depends on their names only."""
    return sorted(things, key=lambda thing: hashlib.blake2b(name(thing).encode()).digest())


def _is_known(path: Path) -> bool:
    known = path.suffix in _TEXT_SUFFIXES | _JSON_SUFFIXES | {".parquet"}
    return known and not any(part.startswith(".") for part in path.parts)


def _record_items(path: Path, text_field: str) -> Iterator[Item]:
    if path.suffix in _JSON_SUFFIXES:
        size = path.stat().st_size
        for start in range(0, size, _PIECE):
            yield JsonLines(path, start, min(start + _PIECE, size), text_field)
    else:
        yield from _parquet_items(path, text_field)


def _parquet_items(path: Path, text_field: str) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        metadata = parquet.read_metadata(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a complete Parquet file ({error}): copy it again or leave it out") from error
    names = metadata.schema.to_arrow_schema().names
    if text_field not in names:
        raise DataError(_no_field(str(path), text_field, names))
    for group in range(metadata.num_row_groups):
        columns = (metadata.row_group(group).column(index) for index in range(metadata.num_columns))
        size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_field)
        yield ParquetGroup(path, group, size, text_field)


def _dataset_items(path: Path, text_field: str) -> Iterator[Item]:
    import datasets

    rows = datasets.Dataset.load_from_disk(str(path))
    if text_field not in rows.column_names:
        raise DataError(_no_field(str(path), text_field, list(rows.column_names)))
    num_rows = len(rows)
    size = rows.select_columns(text_field).data.nbytes
    pieces = max(1, -(-size // _PIECE))
    bounds = [num_rows * piece // pieces for piece in range(pieces + 1)]
    for start, stop in pairwise(bounds):
        yield DatasetRows(path, start, stop, size // pieces, text_field)


def _field(record: dict[str, Any], name: str, place: str) -> str:
    if name not in record:
        raise DataError(_no_field(place, name, list(record)))
    if not isinstance(record[name], str):
        raise DataError(f"{place}: the field {name!r} must be text, not a {type(record[name]).__name__}")
    try:
        record[name].encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: the field {name!r} has half of a surrogate pair: fix it or leave it out") from error
    return record[name]


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def _no_field(place: str, name: str, names: list[str]) -> str:
    return f"{place}: no field {name!r}; there are {', '.join(map(repr, names)) or 'none'}: name one with --text-field"
