"""JSON lines that survive a crash: a line counts when it parses and its newline is there."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

_BLOCK = 1 << 18
"""Bytes that `backwards` reads in one go."""


def dump(row: dict[str, Any]) -> str:
    """A row as one line, newline included. Floats keep all their digits; NaN and infinities as in Python's json."""
    return json.dumps(row, default=_plain, ensure_ascii=False, separators=(", ", ": ")) + "\n"


def parse(line: bytes) -> dict[str, Any] | None:
    """The row in `line`, or None when the line is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Whole rows of a file, in order; torn lines are passed over. A file that is not there has no rows."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            row = parse(line)
            if row is not None:
                yield row


def backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield lines from the last to the first, each with where it ends in the file; a last one may lack its newline.

    What is read is about what is asked for: the end of a long file is found at once."""
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
    """Open for appending. A last line that a crash cut short is ended, so that the next row has a line of its own."""
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
