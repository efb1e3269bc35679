"""The location and the names of a plane's files, on any file system that fsspec supports.

See `store` for their content.

    TABLE/PART-steps-FIRST-LAST.N.parquet        flush N of a part of a table
    TABLE/PART-steps-FIRST-LAST.N-M.parquet      the rows of the flushes N to M, merged (`compact`)

A file counts unless another file of its part and table covers its flushes and more (`live`). So the rename that creates
a merged file also makes its inputs void: a listing taken at any moment has each row once.
"""

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from steptron.atomic import atomic_write
from steptron.monitor.statistics.registry import Registry

FOLDER_NAME = "metrics"
"""The name of the plane's folder in the run folder."""

_REGISTRY, _SPOOL, _OWNER = "registry", "spool", "uid"
ABOUT = b"steptron"
TORN = (KeyError, ValueError)
"""The errors of reading a file that is incomplete or foreign. Arrow's own error is a ValueError."""
_FILE = re.compile(
    r"(?P<part>.+)-steps-(?P<first>\d{8,})-(?P<last>\d{8,})(?:\.(?P<start>\d+)(?:-(?P<end>\d+))?)?\.parquet"
)
"""The pattern of file names. Files of earlier versions may lack the number of a flush; they are never merged."""
_REGISTRY_FILE = re.compile(r"(?P<part>.+)-(?P<first>\d{8,})(?:\.(?P<again>\d+))?\.json")
GROUP_ROWS = 1 << 18
"""The approximate number of rows of a row group: the amount that one reader thread takes at a time."""
_OWNER_S = 5.0
"""The seconds within which the rank that creates the owner file must fill it."""
_ZSTD_LEVEL = 1
"""The compression level. Higher ones take longer and save one percent: the low bytes of a float32 are noise."""

log = logging.getLogger("steptron.monitor")


class File(NamedTuple):
    """A file of a table."""

    path: str
    table: str
    part: str
    first: int
    """The first step in it."""
    last: int
    """The last step in it."""
    start: int
    """The number of the first flush in it; 0 in files of earlier versions."""
    end: int
    """The number of the last flush in it."""

    @property
    def merged(self) -> bool:
        """Return whether it holds several flushes."""
        return self.start < self.end

    def holds(self, other: "File") -> bool:
        """Return whether it covers all flushes of a file of the same part and table, and more."""
        return (self.start, self.end) != (other.start, other.end) and self.start <= other.start <= other.end <= self.end


class RegistryFile(NamedTuple):
    """A file with the meaning of a part's slots from step `first` on."""

    path: str
    part: str
    first: int
    again: int
    """A number that distinguishes files of one part and first step: the highest is the newest."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """The location of a plane: a file system and the path in it."""

    fs: Any
    path: str

    @staticmethod
    def at(folder: str | Path) -> "Folder":
        """Return the folder of a path or URL. It need not exist."""
        fs, path = fsspec.core.url_to_fs(str(folder))
        return Folder(fs=fs, path=path.rstrip("/"))

    @property
    def local(self) -> bool:
        """Return whether the folder is on this machine's own file system."""
        return isinstance(self.fs, LocalFileSystem)

    @property
    def url(self) -> str:
        """Return the URL in the form that readers of fsspec's file systems expect, with its protocol."""
        return self.url_of(self.path)

    def url_of(self, path: str) -> str:
        """Return such a URL of a path in the file system."""
        protocol = self.fs.protocol if isinstance(self.fs.protocol, str) else self.fs.protocol[0]
        return path if self.local else f"{protocol}://{path}"

    def files(self, part: str = "*", table: str = "*") -> list[File]:
        """Return the files that count, sorted by table, part and steps. `part` and `table` are patterns."""
        return live(self.listed(part, table))

    def listed(self, part: str = "*", table: str = "*") -> list[File]:
        """Return every file of the plane, including those that do not count; sorted as in `files`."""
        self.fs.invalidate_cache()
        found = []
        for folder in self._list(self.path):
            name = folder.rpartition("/")[2]
            if name not in (_REGISTRY, _SPOOL) and fnmatchcase(name, table):
                for path in self._list(folder):
                    match = _FILE.fullmatch(path.rpartition("/")[2])
                    if match and fnmatchcase(match["part"], part):
                        first, last, start = (int(match[key] or 0) for key in ("first", "last", "start"))
                        end = int(match["end"] or start)
                        found.append(File(path, name, match["part"], first, last, start, end))
        return sorted(found, key=_ORDER)

    def _list(self, path: str) -> list[str]:
        """Return the content of a folder. Expanding a pattern (`glob`) would be noticeably slow for a long run."""
        try:
            return self.fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def tables(self) -> list[str]:
        """Return the tables with at least one file."""
        return sorted({file.table for file in self.files()})

    def remove(self, path: str) -> None:
        """Delete a file."""
        self.fs.rm_file(path)

    def put_aside(self, path: str, why: object) -> None:
        """Rename a file so that no reader finds it, and log the reason."""
        log.warning("%s cannot be read, and is put aside as %s.torn: %s", path, path, str(why).splitlines()[0])
        self.fs.mv(path, f"{path}.torn")

    def owner(self) -> str:
        """Return the uid of the run that owns this plane; empty if none is recorded."""
        self.fs.invalidate_cache()
        try:
            return self.fs.cat_file(f"{self.path}/{_OWNER}").decode(errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return ""

    def own(self, uid: str) -> str:
        """Return the uid of the run that owns this plane; if none is recorded, record `uid` first."""
        path = f"{self.path}/{_OWNER}"
        self.fs.invalidate_cache()
        if self.local:
            self.fs.makedirs(self.path, exist_ok=True)
            with suppress(FileExistsError), open(path, "x") as file:  # if several ranks try at once, one succeeds
                file.write(uid)
        elif not self.fs.exists(path):
            self.fs.pipe_file(path, uid.encode())
        deadline = time.monotonic() + _OWNER_S
        while not (owner := self.owner()):
            if time.monotonic() > deadline:
                raise OSError(f"{path} is empty: delete it")
            time.sleep(0.01)
        return owner

    def disown(self) -> None:
        """Forget the run that owns this plane."""
        self.fs.invalidate_cache()
        with suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.path}/{_OWNER}")

    def write_bytes(self, path: str, content: bytes) -> None:
        """Write a small file, completely or not at all."""
        if not self.local:
            self.fs.pipe_file(path, content)  # object stores show an object only when it is complete
            return
        self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        with atomic_write(Path(path)) as temporary:
            temporary.write_bytes(content)

    def write_tables(self, by_path: Mapping[str, "FileContent"], durable: bool = False) -> None:
        """Write Parquet files; all of them are complete before the first gets its name.

        After a failure, the caller must remove what was written. With `durable`, the files and their names survive a
        power failure.
        """
        if not self.local:
            for path, rows in by_path.items():
                buffer = pa.BufferOutputStream()
                _write_parquet(buffer, rows)
                self.fs.pipe_file(path, buffer.getvalue().to_pybytes())
            return
        with ExitStack() as stack:  # it closes in reverse: the first path gets its name first
            for path, rows in reversed(list(by_path.items())):
                self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                temporary = stack.enter_context(atomic_write(Path(path), durable=durable))
                _write_parquet(str(temporary), rows)

    def clean(self, part: str) -> None:
        """Remove what a killed writer of this part left behind."""
        if self.local:
            for path in Path(self.path).glob(f"*/.{part}-*.tmp"):
                path.unlink(missing_ok=True)

    def registries(self, part: str = "*") -> list[tuple[int, str, Registry]]:
        """Return (first step, part, registry) by rising step. Incomplete files are skipped."""
        return [(file.first, file.part, known) for file, known in self.read_registries(part)]

    def read_registries(self, part: str = "*") -> list[tuple[RegistryFile, Registry]]:
        """Return files and registries, by rising step."""
        found = []
        for file in self.registry_files(part):
            try:
                found.append((file, Registry.from_dict(json.loads(self.fs.cat_file(file.path)))))
            except (OSError, ValueError):
                continue
        return found

    def registry_files(self, part: str = "*") -> list[RegistryFile]:
        """Return the registry files by rising step, whatever they contain."""
        self.fs.invalidate_cache()
        found = []
        for path in self.fs.glob(f"{self.path}/{_REGISTRY}/{part}-*.json"):
            match = _REGISTRY_FILE.fullmatch(path.rpartition("/")[2])
            if match is not None:
                found.append(RegistryFile(path, match["part"], int(match["first"]), int(match["again"] or 0)))
        return sorted(found, key=itemgetter(2, 1, 3))

    def registry_path(self, part: str, first: int, again: int = 0) -> str:
        """Return the path of the registry that a part uses from step `first` on."""
        return f"{self.path}/{_REGISTRY}/{part}-{first:08d}{f'.{again}' if again else ''}.json"


@dataclass(frozen=True, kw_only=True)
class FileContent:
    """The content of a file to be written."""

    schema: pa.Schema
    """The columns of the file; `ABOUT` in its metadata is the file's own metadata."""
    tables: Iterable[pa.Table]
    """Tables of one row group or more each, requested one after the other."""


_ORDER = itemgetter(1, 2, 3, 4, 5, 6)
"""The sort order of files: table, part, steps, flushes."""


def live(files: Iterable[File]) -> list[File]:
    """Return the files whose rows count, sorted by table, part and steps.

    A file does not count if another file of its part and table has its flushes too. Of two files with the same flushes,
    the one with fewer steps counts: the steps that it lacks were dropped.
    """
    kept: list[File] = []
    for file in sorted(files, key=lambda file: (file.table, file.part, file.start, -file.end, file.first, file.last)):
        before = kept[-1] if kept and kept[-1][1:3] == file[1:3] else None
        cut = before is not None and (before.first, *before[5:]) == (file.first, *file[5:])
        if before is None or not (cut or before.holds(file)):
            kept.append(file)
    return sorted(kept, key=_ORDER)


def file_name(part: str, first: int, last: int, start: int, end: int) -> str:
    """Return the name of a table's file, of these steps and flushes."""
    flushes = f".{start}{f'-{end}' if end > start else ''}" if end else ""
    return f"{part}-steps-{first:08d}-{last:08d}{flushes}.parquet"


def read_about(folder: Folder, file: File) -> dict[str, Any]:
    """Return the metadata of a file. Raises one of `TORN` if that fails."""
    with folder.fs.open(file.path) as opened:
        try:
            return about_of(pq.read_schema(opened))
        except OSError as error:
            if folder.local and error.errno is None:  # Arrow's error for an invalid footer
                raise ValueError(str(error)) from error
            raise


def about_of(schema: pa.Schema) -> dict[str, Any]:
    """Return the metadata of an open file."""
    return json.loads((schema.metadata or {})[ABOUT])


def _write_parquet(where: Any, rows: FileContent) -> None:
    """Write one file."""
    schema = rows.schema
    floats = [f.name for f in schema if f.type == pa.float32()]
    keys = [f.name for f in schema if f.type != pa.float32()]
    # A float's exponent compresses if bytes are split, and repeated keys compress in dictionaries. Readers skip by keys
    # only.
    options: dict[str, Any] = {"use_dictionary": keys, "use_byte_stream_split": floats, "write_statistics": keys}
    with pq.ParquetWriter(where, schema, compression="zstd", compression_level=_ZSTD_LEVEL, **options) as writer:
        for table in rows.tables:
            writer.write_table(table, row_group_size=GROUP_ROWS)
