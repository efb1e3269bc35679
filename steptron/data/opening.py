"""Opening of input files: content decides the compression and the kind; the name only helps where content cannot.

path → magic bytes → decompressed bytes → Parquet, Arrow, JSON lines or text; or NotReadable with the reason
"""

import bz2
import enum
import gzip
import io
import itertools
import json
import lzma
import os
import re
import shlex
import stat
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from steptron.errors import DataError

_TEXT_SUFFIXES = frozenset(
    (
        ".txt .md .rst .tex .html .xml .py .pyi .ipynb .c .h .cc .cpp .hpp .cu .java .kt .scala .js .ts .jsx .tsx .css "
        ".go .rs .rb .php .swift .lua .r .jl .hs .ml .sql .sh .pl .toml .yaml .yml"
    ).split()
)
_LINES_SUFFIXES = frozenset([".jsonl", ".ndjson"])
_ARROW_SUFFIXES = frozenset([".arrow", ".feather"])
_TOKEN_SUFFIXES = frozenset([".bin", ".idx", ".ds"])
_PACKED_SUFFIXES = frozenset([".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz"])
_HEAD = 2**16
"""The number of bytes that decide the kind, after decompression."""
_LONGEST_LINE = 2**26
"""The longest first line, in bytes, that is parsed to decide whether a file holds JSON lines."""
_LARGEST_VALUE = 2**24
"""The largest file, in bytes, that is parsed whole to decide whether it is one JSON value."""
_JSON_BEGINS = re.compile(rb'\s*(\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:')

DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""The errors of reading a file that cannot be opened, is cut short, or is damaged inside its compression."""


class Kind(enum.Enum):
    """A kind of file that the build reads."""

    TEXT = "text"
    JSON_LINES = "JSON lines"
    PARQUET = "Parquet"
    ARROW = "Arrow"


class NotReadable(DataError):
    """An input that is not read. The message is the reason and the way out, without the place."""


def shown(path: Path | str) -> str:
    """Return a path as text that can be printed: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def as_typed(specs: Iterable[str]) -> str:
    """Return inputs as a shell takes them, printable."""
    return shlex.join(map(shown, specs))


def compression(path: Path) -> str | None:
    """Return "gz", "zst", "bz2" or "xz" by the file's first bytes, or None. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(6)
    if head.startswith(b"\x1f\x8b"):
        return "gz"
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        return "zst"  # the second form is a skippable frame, with which pzstd begins
    if re.match(rb"BZh[1-9]", head):
        return "bz2"
    return "xz" if head == b"\xfd7zXZ\x00" else None


def open_plain(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, decompressed where needed. It and its reads raise one of DAMAGED."""
    openers: dict[str | None, Callable[[Path], Any]] = {
        None: lambda path: path.open("rb"),
        "gz": gzip.open,
        "bz2": bz2.open,
        "xz": lzma.open,
        "zst": _open_zstandard,
    }
    return openers[compression(path)](path)


def find_kind(path: Path, named: bool) -> Kind:
    """Return the kind of a file. A file that the user named is text if it is nothing else.

    Raises NotReadable if the file cannot be opened or is of no kind that is read. JSON is never taken for text.
    """
    try:
        return _find_kind(path, named)
    except DAMAGED as error:
        raise NotReadable(f"cannot be read ({why(error)}): copy it again or leave it out") from error


def why(error: BaseException) -> str:
    """Return an error's message in one line, without the path that some messages repeat."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _find_kind(path: Path, named: bool) -> Kind:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise NotReadable("is not a regular file: write its content into one, or leave it out")
    if not status.st_size:
        raise NotReadable("is empty: leave it out")
    packed = compression(path)
    suffix = Path(path.stem).suffix if path.suffix in _PACKED_SUFFIXES else path.suffix
    with open_plain(path) as file:
        head = file.read(_HEAD)
    stored = _stored_kind(head, suffix)
    if stored and packed:
        raise NotReadable(f"is {stored.value} inside {packed}: decompress it first")
    if stored:
        return stored
    if not head:
        raise NotReadable("is empty after decompression: leave it out")
    if suffix in _LINES_SUFFIXES:
        return Kind.JSON_LINES
    if suffix == ".ipynb":  # a notebook is code, by its name, though it is stored as JSON
        return Kind.TEXT
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[") and _is_json_lines(path, head):
        return Kind.JSON_LINES
    if suffix == ".json":
        raise NotReadable("is not JSON lines (one object per line): convert it, or leave it out")
    if suffix in _TEXT_SUFFIXES:
        return Kind.TEXT
    if b"\0" in head and suffix in _TOKEN_SUFFIXES:
        raise NotReadable("may hold tokens: make a source of it with `steptron data import`, or leave it out")
    if b"\0" in head:
        raise NotReadable("is of an unknown binary kind: leave it out, or convert it to JSON lines or Parquet")
    if named:
        return Kind.TEXT
    raise NotReadable(f"is of an unknown kind (suffix {suffix!r}): leave it out, or name the file itself to read text")


def _stored_kind(head: bytes, suffix: str) -> Kind | None:
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return Kind.PARQUET
    return Kind.ARROW if head.startswith(b"ARROW1\0\0") or suffix in _ARROW_SUFFIXES else None


def _is_json_lines(path: Path, head: bytes) -> bool:
    """Return True for JSON lines and False for text that only begins with a bracket. Raises NotReadable for other
    JSON."""
    with open_plain(path) as file:
        lines = (line for line in iter(lambda: file.readline(_LONGEST_LINE), b"") if line.strip())
        first, second = (_parsed(line) for line in itertools.islice(itertools.chain(lines, (b"", b"")), 2))
    if isinstance(first, dict):
        return True
    # Lines of arrays are JSON too; but a text may begin with a line such as "[1]".
    arrays = isinstance(first, list) and isinstance(second, list | dict)
    if not arrays and not _JSON_BEGINS.match(head.removeprefix(b"\xef\xbb\xbf")):
        with open_plain(path) as file:
            whole = file.read(_LARGEST_VALUE + 1)
        if len(whole) > _LARGEST_VALUE or _parsed(whole) is None:
            return False
    raise NotReadable(
        "is JSON, but not JSON lines (one object per line): convert it (an array: `jq -c '.[]'`), or leave it out"
    )


def _parsed(text: bytes) -> Any:
    """Return the JSON value of the text, None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _open_zstandard(path: Path) -> IO[bytes]:
    import pyarrow

    raw: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(path.open("rb"), "r"), "zstd")
    return io.BufferedReader(raw, 2**20)
