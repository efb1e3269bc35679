"""Where a plane's files are and how they are named, on any file system that fsspec knows; see `store` for what is in them."""

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from steptron.monitor.registry import Registry

FOLDER_NAME = "metrics"
"""Of the plane, in the run folder."""

_REGISTRY, _SPOOL = "registry", "spool"
ABOUT = b"steptron"
_FILE = re.compile(r"(?P<part>.+)-steps-(?P<first>\d{8,})-(?P<last>\d{8,})(?:\.(?P<again>\d+))?\.parquet")
_REGISTRY_FILE = re.compile(r"(?P<part>.+)-(?P<first>\d{8,})\.json")
_GROUP_ROWS = 1 << 18
"""Rows of a row group, about: what one reader thread takes at a time."""
_ZSTD_LEVEL = 1
"""Higher levels take longer and save one percent: the low bytes of a float32 are noise."""


class File(NamedTuple):
    """A file of a table."""

    path: str
    table: str
    part: str
    first: int
    last: int
    again: int
    """0, or a number that tells files of one part and first step apart."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Where a plane is: a file system and the path in it."""

    fs: Any
    path: str

    @staticmethod
    def at(folder: str | Path) -> "Folder":
        """Of a path or URL; it need not be there."""
        fs, path = fsspec.core.url_to_fs(str(folder))
        return Folder(fs=fs, path=path.rstrip("/"))

    @property
    def local(self) -> bool:
        """On this machine's own file system."""
        return isinstance(self.fs, LocalFileSystem)

    @property
    def url(self) -> str:
        """As readers that know fsspec's file systems by their protocol want it."""
        protocol = self.fs.protocol if isinstance(self.fs.protocol, str) else self.fs.protocol[0]
        return self.path if self.local else f"{protocol}://{self.path}"

    def files(self, part: str = "*", table: str = "*") -> list[File]:
        """Files of the plane, sorted by table, part and steps. `part` and `table` are patterns."""
        self.fs.invalidate_cache()
        found = []
        for folder in self._list(self.path):
            name = folder.rpartition("/")[2]
            if name not in (_REGISTRY, _SPOOL) and fnmatchcase(name, table):
                for path in self._list(folder):
                    match = _FILE.fullmatch(path.rpartition("/")[2])
                    if match and fnmatchcase(match["part"], part):
                        first, last, again = (int(match[key] or 0) for key in ("first", "last", "again"))
                        found.append(File(path, name, match["part"], first, last, again))
        return sorted(found, key=itemgetter(1, 2, 3, 4, 5))

    def _list(self, path: str) -> list[str]:
        """What is in a folder; of a pattern's expansion (`glob`) a long run would notice the cost."""
        try:
            return self.fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def tables(self) -> list[str]:
        """Tables with at least one file."""
        return sorted({file.table for file in self.files()})

    def remove(self, path: str) -> None:
        """Delete a file."""
        self.fs.rm_file(path)

    def write_bytes(self, path: str, content: bytes) -> None:
        """A small file, whole or not at all."""
        if not self.local:
            self.fs.pipe_file(path, content)  # object stores show an object when it is complete
            return
        self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        temporary = Path(f"{path}.tmp")
        temporary.write_bytes(content)
        temporary.replace(path)

    def write_tables(self, by_path: dict[str, list[pa.Table]]) -> None:
        """Parquet files; all are on disk before the first gets its name."""
        if not self.local:
            for path, tables in by_path.items():
                buffer = pa.BufferOutputStream()
                _write_parquet(buffer, tables)
                self.fs.pipe_file(path, buffer.getvalue().to_pybytes())
            return
        try:
            for path, tables in by_path.items():
                self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                _write_parquet(f"{path}.tmp", tables)
        except OSError:
            for path in by_path:
                Path(f"{path}.tmp").unlink(missing_ok=True)
            raise
        for path in by_path:
            Path(f"{path}.tmp").replace(path)

    def clean(self, part: str) -> None:
        """Remove what a killed writer of this part left behind."""
        if self.local:
            for path in Path(self.path).glob(f"*/{part}-*.tmp"):
                path.unlink(missing_ok=True)

    def registries(self, part: str = "*") -> list[tuple[int, str, Registry]]:
        """First step, part, and registry from there on, by rising step. Files that are torn are passed over."""
        self.fs.invalidate_cache()
        found = []
        for path in self.fs.glob(f"{self.path}/{_REGISTRY}/{part}-*.json"):
            match = _REGISTRY_FILE.fullmatch(path.rpartition("/")[2])
            if match is None:
                continue
            try:
                found.append(
                    (int(match["first"]), match["part"], Registry.from_dict(json.loads(self.fs.cat_file(path))))
                )
            except (OSError, ValueError):
                continue
        return sorted(found, key=lambda row: row[:2])

    def registry_path(self, part: str, first: int) -> str:
        """Of the registry that a part has from step `first` on."""
        return f"{self.path}/{_REGISTRY}/{part}-{first:08d}.json"


def file_name(part: str, first: int, last: int, again: int = 0) -> str:
    """Name of a table's file."""
    return f"{part}-steps-{first:08d}-{last:08d}{f'.{again}' if again else ''}.parquet"


def read_about(folder: Folder, file: File) -> dict[str, Any]:
    with folder.fs.open(file.path) as opened:
        return about_of(pq.read_schema(opened))


def about_of(schema: pa.Schema) -> dict[str, Any]:
    """What a file says of itself."""
    return json.loads((schema.metadata or {})[ABOUT])


def _write_parquet(where: Any, tables: list[pa.Table]) -> None:
    """One file of all the tables' rows."""
    schema = tables[0].schema
    floats = [f.name for f in schema if f.type == pa.float32()]
    keys = [f.name for f in schema if f.type != pa.float32()]
    # Split by byte, a float's exponent compresses; keys repeat: dictionaries. Readers skip by keys alone.
    options: dict[str, Any] = {"use_dictionary": keys, "use_byte_stream_split": floats, "write_statistics": keys}
    with pq.ParquetWriter(where, schema, compression="zstd", compression_level=_ZSTD_LEVEL, **options) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=_GROUP_ROWS)
