"""Readers: an item is a piece of an input that one process reads, and a class here reads one kind of file.

item → documents() → texts, and an Unread for everything in it that is not read
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from steptron.data.fields import Fields
from steptron.data.opening import DAMAGED, NotReadable, compression, open_plain, shown, why

_PIECE = 16 * 2**20
"""The bytes of JSON lines or of a dataset in one item."""
_COMPRESSED_BY = 4
"""A usual ratio of text to its compressed size, for the progress bar and the division into parts."""
_EMPTY = "is empty: leave it out"


@dataclass(frozen=True)
class Unread:
    """Something in the inputs that is not read: a file, or a record in it."""

    place: str
    """The file, and the line or row in it, printable."""
    reason: str
    """The reason and the way out."""

    def __str__(self) -> str:
        return f"{self.place} {self.reason}"


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

    def documents(self) -> Iterator[str | Unread]:
        """Yield the documents in order. An Unread stands in the place of a document that is not read."""
        ...


@dataclass(frozen=True)
class TextFile:
    """A whole file, UTF-8, as one document."""

    path: Path
    num_bytes: int
    fields: Fields

    @property
    def origin(self) -> str:
        return stamp(self.path) + self.fields.marks

    def documents(self) -> Iterator[str | Unread]:
        try:
            with open_plain(self.path) as file:
                text = file.read().decode("utf-8")
            yield self.fields.plain(text) if text else Unread(shown(self.path), _EMPTY)
        except UnicodeDecodeError as error:
            yield Unread(shown(self.path), f"is not UTF-8 at byte {error.start}: convert it or leave it out")
        except DAMAGED as error:
            yield _damaged(shown(self.path), error)
        except NotReadable as error:
            yield Unread(shown(self.path), str(error))


@dataclass(frozen=True)
class JsonLines:
    """The lines of a file that begin in bytes [start, stop), one JSON object with one document each.

    A compressed file is one item: start is 0 and stop None.
    """

    path: Path
    start: int
    stop: int | None
    fields: Fields

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size * _COMPRESSED_BY if self.stop is None else self.stop - self.start

    @property
    def origin(self) -> str:
        return f"{stamp(self.path)} {self.start} {self.fields.origin}"

    def documents(self) -> Iterator[str | Unread]:
        count, before = 0, None
        try:
            with open_plain(self.path) as file:
                if self.start:
                    # The line that holds the byte before `start` belongs to the piece before.
                    file.seek(self.start - 1)
                    file.readline()
                begin = position = file.tell() if self.start else 0
                while (self.stop is None or position < self.stop) and (line := file.readline()):
                    position += len(line)
                    count += 1
                    if not line.strip():
                        continue
                    try:
                        yield self._text(line)
                    except NotReadable as error:
                        before = self._lines_before(begin) if before is None else before
                        yield Unread(f"{shown(self.path)}, line {before + count}:", str(error))
        except DAMAGED as error:
            yield _damaged(f"{shown(self.path)}, after {count} lines:", error)

    def _lines_before(self, position: int) -> int:
        """Return the number of lines before a byte. Only a message needs it."""
        count = 0
        with self.path.open("rb") as file:
            while position > 0 and (block := file.read(min(position, 2**20))):
                count += block.count(b"\n")
                position -= len(block)
        return count

    def _text(self, line: bytes) -> str:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise NotReadable(f"not JSON ({why(error)}): fix the line or leave it out") from error
        if not isinstance(record, dict):
            raise NotReadable(f"must be a JSON object, not a {type(record).__name__}")
        return self.fields.document(record)


@dataclass(frozen=True)
class ParquetGroup:
    """One row group of a Parquet file, with one document per row."""

    path: Path
    group: int
    num_bytes: int
    fields: Fields

    @property
    def origin(self) -> str:
        return f"{stamp(self.path)} {self.group} {self.fields.origin}"

    def documents(self) -> Iterator[str | Unread]:
        import pyarrow
        import pyarrow.parquet as parquet

        place, count = f"{shown(self.path)}, row group {self.group}", 0
        try:
            with self.path.open("rb") as raw, parquet.ParquetFile(raw) as file:
                for batch in file.iter_batches(
                    batch_size=256, row_groups=[self.group], columns=list(self.fields.options)
                ):
                    for record in _records(batch):
                        yield row_text(record, self.fields, f"{place}, row {count}:")
                        count += 1
        except (pyarrow.ArrowException, OSError) as error:
            yield _damaged(f"{place}, after {count} rows:", error)


@dataclass(frozen=True)
class ArrowFile:
    """Record batches [start, stop) of an Arrow file, with one document per row.

    A file in the stream format, which has no index, is one item: start is 0 and stop None.
    """

    path: Path
    start: int
    stop: int | None
    num_bytes: int
    fields: Fields

    @property
    def origin(self) -> str:
        return f"{stamp(self.path)} {self.start} {self.fields.origin}"

    def documents(self) -> Iterator[str | Unread]:
        import pyarrow

        place, count = shown(self.path) + (f", from batch {self.start}" if self.start else ""), 0
        try:
            with self.path.open("rb") as raw:
                columns = self.fields.columns(_open_arrow(raw).schema)
                raw.seek(0)
                reader = _open_arrow(raw)
                batches = reader if self.stop is None else map(reader.get_batch, range(self.start, self.stop))
                for batch in batches:
                    for record in _records(batch.select(columns)):
                        yield row_text(record, self.fields, f"{place}, row {count}:")
                        count += 1
        except (pyarrow.ArrowException, OSError) as error:
            yield _damaged(f"{place}, after {count} rows:", error)


@dataclass(frozen=True)
class DatasetRows:
    """Rows [start, stop) of a dataset that `datasets` saved to disk, with one document per row."""

    path: Path
    start: int
    stop: int
    num_bytes: int
    fields: Fields

    @property
    def origin(self) -> str:
        return f"{stamp(self.path / 'state.json')} {self.start} {self.fields.origin}"

    def documents(self) -> Iterator[str | Unread]:
        import datasets

        rows = datasets.Dataset.load_from_disk(str(self.path))
        rows = rows.select_columns(self.fields.columns(rows.features.arrow_schema))
        for row in range(self.start, self.stop):
            try:
                record = dict(rows[row])
            except UnicodeDecodeError:
                record = None
            yield row_text(record, self.fields, f"{shown(self.path)}, row {row}:")


def text_items(path: Path, fields: Fields) -> Iterator[Item]:
    """Yield the one item of a file of text."""
    yield TextFile(path, path.stat().st_size, fields)


def json_items(path: Path, fields: Fields) -> Iterator[Item]:
    """Yield the pieces of a file of JSON lines."""
    if compression(path):
        yield JsonLines(path, 0, None, fields)
        return
    size = path.stat().st_size
    for start in range(0, size, _PIECE):
        yield JsonLines(path, start, min(start + _PIECE, size), fields)


def parquet_items(path: Path, fields: Fields) -> Iterator[Item]:
    """Yield the row groups of a Parquet file. Raises NotReadable if it is damaged or lacks the field."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with path.open("rb") as file:
            metadata = parquet.read_metadata(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise NotReadable(f"is not a complete Parquet file ({why(error)}): copy it again or leave it out") from error
    fields.columns(metadata.schema.to_arrow_schema())
    for group in range(metadata.num_row_groups):
        columns = (metadata.row_group(group).column(index) for index in range(metadata.num_columns))
        size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == fields.text)
        yield ParquetGroup(path, group, size, fields)


def arrow_items(path: Path, fields: Fields) -> Iterator[Item]:
    """Yield the pieces of an Arrow file. Raises NotReadable if it is damaged or lacks the field."""
    import pyarrow

    try:
        with path.open("rb") as file:
            reader = _open_arrow(file)
            schema = reader.schema
            indexed = isinstance(reader, pyarrow.RecordBatchFileReader)
            num_batches = reader.num_record_batches if indexed else None
    except (pyarrow.ArrowException, OSError) as error:
        raise NotReadable(f"is not a complete Arrow file ({why(error)}): copy it again or leave it out") from error
    fields.columns(schema)
    size = path.stat().st_size
    if num_batches is None:
        yield ArrowFile(path, 0, None, size, fields)
        return
    pieces = max(1, min(num_batches, -(-size // _PIECE)))
    for start, stop in pairwise(num_batches * piece // pieces for piece in range(pieces + 1)):
        yield ArrowFile(path, start, stop, size // pieces, fields)


def dataset_items(path: Path, fields: Fields) -> Iterator[Item]:
    """Yield the pieces of a saved dataset. Raises NotReadable if it is damaged or lacks the field."""
    import datasets

    try:
        rows = datasets.Dataset.load_from_disk(str(path))
    except Exception as error:  # datasets raises what its files' contents lead to
        raise NotReadable(f"is not a complete dataset ({why(error)}): save it again or leave it out") from error
    columns = fields.columns(rows.features.arrow_schema)
    num_rows = len(rows)
    size = rows.select_columns(columns).data.nbytes
    pieces = max(1, -(-size // _PIECE))
    bounds = [num_rows * piece // pieces for piece in range(pieces + 1)]
    for start, stop in pairwise(bounds):
        yield DatasetRows(path, start, stop, size // pieces, fields)


def _open_arrow(file: Any) -> Any:
    """Return a reader of the file format or of the stream format."""
    import pyarrow

    magic = file.read(6)
    file.seek(0)
    return (pyarrow.ipc.open_file if magic == b"ARROW1" else pyarrow.ipc.open_stream)(file)


def _records(batch: Any) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of a record batch, None for a row with text that is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            yield None
        else:
            for row in range(batch.num_rows):
                yield from _records(batch.slice(row, 1))


def row_text(record: dict[str, Any] | None, fields: Fields, place: str) -> str | Unread:
    """Return the text of a row, or why it is not read. None stands for a row that is not UTF-8."""
    if record is None:
        return Unread(place, "is not UTF-8: convert it or leave it out")
    try:
        return fields.document(record)
    except NotReadable as error:
        return Unread(place, str(error))


def _damaged(place: str, error: BaseException) -> Unread:
    return Unread(place, f"cannot be read further ({why(error)}): copy it again or leave it out")


def stamp(path: Path) -> str:
    """Return a text that identifies a file and changes when its content does."""
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
