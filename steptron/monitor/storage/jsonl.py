"""JSON lines that survive a crash: a line counts only if it parses and ends with a newline."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

_BLOCK = 1 << 18
"""The number of bytes that `backwards` reads at a time."""


def dump(row: dict[str, Any]) -> str:
    """Return a row as one line with its newline. Floats keep all digits; NaN and infinities are as in Python's json."""
    return json.dumps(row, default=_plain, ensure_ascii=False, separators=(", ", ": ")) + "\n"


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the row in `line`, or None if the line is incomplete."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete rows of a file, in order; skip incomplete lines. A missing file has no rows."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            row = parse(line)
            if row is not None:
                yield row


def backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines from last to first, each with the position of its end; the last line may lack its newline.

    Only as much of the file is read as is consumed, so the end of a long file is found at once.
    """
    with path.open("rb") as file:
        start = file.seek(0, os.SEEK_END)
        left = b""
        while start:
            end = start + len(left)
            start = max(0, start - _BLOCK)
            file.seek(start)
            block = file.read(end - len(left) - start) + left
            found = block.splitlines(keepends=True)
            left = found.pop(0) if start else b""
            for line in reversed(found):
                yield end, line
                end -= len(line)


def open_to_append(path: Path) -> TextIO:
    """Open for appending. End a last line that a crash has cut short, so that the next row starts on a new line."""
    torn = False
    if path.exists() and path.stat().st_size > 0:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
    file = path.open("a", encoding="utf-8")
    if torn:
        file.write("\n")
    return file


def _plain(value: Any) -> Any:
    """Convert values that json does not know: frozen recipe values, NumPy scalars and arrays, paths."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON: give its fields or its text instead")
