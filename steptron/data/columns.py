"""Columns of numbers in files, read at any place: the part that a call asks for, and nothing else.

file → File (bytes of a range) → Column (numbers of a range; search in a column that rises)

Files are read, not mapped: pages of a map that were touched would count as memory of the process, and a file that
shrinks would kill it.
"""

import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from steptron.errors import DataError

_BLOCK = 512
"""The number of numbers that are read at once in a search."""
_MOST = 2**13
"""The largest number of numbers that are expected, and read together with the first one."""


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return arrays as one. A single one is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class File:
    """A file that is read at any place."""

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            found = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise DataError(f"{path} {found}: copy it again or build it again") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._path = path
        self.size = os.fstat(self._descriptor).st_size

    def read(self, start: int, num_bytes: int) -> bytes:
        found = os.pread(self._descriptor, num_bytes, start)
        if len(found) == num_bytes:
            return found
        parts, done = [found], len(found)
        while done < num_bytes:  # one call reads 2 GiB at most
            more = os.pread(self._descriptor, num_bytes - done, start + done)
            if not more:
                raise DataError(f"{self._path} has become shorter: copy it again or build it again")
            parts.append(more)
            done += len(more)
        return b"".join(parts)


class Column:
    """Numbers of one type in a file."""

    def __init__(self, file: File, dtype: str | np.dtype, offset: int, size: int) -> None:
        self._file, self._type, self._offset, self.size = file, np.dtype(dtype), offset, size

    def read(self, start: int, stop: int) -> np.ndarray:
        width = self._type.itemsize
        return np.frombuffer(self._file.read(self._offset + start * width, (stop - start) * width), self._type)

    def at(self, index: int) -> int:
        return int(self.read(index, index + 1)[0])

    def between(self, low: int, high: int, guess: int, count: int) -> tuple[int, np.ndarray]:
        """Return the place of the first number ≥ low of a column that rises, and all numbers in [low, high).

        `guess`, `count`: the place and how many numbers there probably are.
        """
        room = _BLOCK + min(count, _MOST)
        start = max(min(guess - _BLOCK // 2, self.size - room), 0)
        block = self.read(start, min(start + room, self.size))
        first, last = int(block.searchsorted(low)), int(block.searchsorted(high))
        if 0 < first <= last < len(block):  # the guess was good, as it mostly is
            return start + first, block[first:last]
        first, parts, room = self._search(low, guess), [], _BLOCK
        place = first
        while place < self.size:
            part = self.read(place, min(place + room, self.size))
            count = int(part.searchsorted(high))
            parts.append(part[:count])
            if count < len(part):
                break
            place, room = place + room, 2 * room
        return first, parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, self._type)])

    def _search(self, value: int, guess: int) -> int:
        """Return the place of the first number ≥ value.

        In turns, a block is read where the one before points to, and in the middle of what is left, so that a search
        ends soon on even columns and always after some reads.
        """
        low, high, turn = 0, self.size, 0
        while high - low > _BLOCK:
            start = min(max(guess - _BLOCK // 2, low), high - _BLOCK)
            block = self.read(start, start + _BLOCK)
            first, last = block.item(0), block.item(-1)
            if first >= value and start > low:
                high = start
            elif last < value:
                low = start + _BLOCK
            else:
                return start + int(block.searchsorted(value))
            turn += 1
            slope = max(last - first, 1) / _BLOCK
            guess = start + int((value - first) / slope) if turn % 2 else (low + high) // 2
        return low + int(self.read(low, high).searchsorted(value))
