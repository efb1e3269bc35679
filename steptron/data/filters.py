"""The filters of a build: documents that repeat themselves, and the marks by which copies are found.

tokens → has_repeats. text → signature → duplicates.py
"""

import hashlib
import re
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from steptron.errors import DataError

if TYPE_CHECKING:
    from datasketch import MinHash

LONGEST_PERIOD = 13
MOST_TIMES = 32
"""An n-gram of 1 to LONGEST_PERIOD tokens that stands MOST_TIMES times in a row makes a document a bad one. The rule is
that of OLMo 2 (arXiv 2501.00656)."""

_WORDS = 5
"""The number of words in a shingle."""
_BANDS, _ROWS = 14, 8
"""Two documents of which a share s of the shingles is common are near-duplicates with probability 1 − (1 − s^8)^14:
56 % at 0.7, 92 % at 0.8, 99.9 % at 0.9. The numbers are those of FineWeb (arXiv 2406.17557)."""
_HAN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_HAN}]|[^\W{_HAN}]+")
"""A word, or one character of a script that has no spaces between words."""

KINDS = {"exact": 1, "near": _BANDS}
"""The kinds of copies, and the number of marks of each."""


def has_repeats(ids: np.ndarray) -> bool:
    """Return True if some n-gram of 1 to 13 tokens follows itself so often that it stands 32 times in a row."""
    for period in range(1, LONGEST_PERIOD + 1):
        needed = period * (MOST_TIMES - 1)
        equal = ids[period:] == ids[:-period]
        if np.count_nonzero(equal) < needed:
            continue
        borders = np.flatnonzero(~equal)
        if np.diff(borders, prepend=-1, append=len(equal)).max() - 1 >= needed:
            return True
    return False


def signature(text: str, kind: str) -> np.ndarray:
    """Return marks of a text, u64: two texts are copies if they have a mark in common in the same place.

    exact: one hash of the text. near: a hash of each band of its MinHash.
    """
    if kind == "exact":
        return np.array([_hash(text.encode())], dtype=np.uint64)
    words = _WORD.findall(text.lower())
    shingles = {" ".join(words[n : n + _WORDS]) for n in range(max(1, len(words) - _WORDS + 1))}
    sketch = _empty_sketch().copy()
    sketch.update_batch([shingle.encode() for shingle in sorted(shingles)])
    rows: Any = sketch.hashvalues
    bands = np.asarray(rows, dtype=np.uint64).reshape(_BANDS, _ROWS)
    return np.array([_hash(band.tobytes()) for band in bands], dtype=np.uint64)


def check_kind(kind: str | None) -> None:
    """Raise DataError if near-duplicates are asked for without the library that finds them."""
    if kind == "near" and find_spec("datasketch") is None:
        raise DataError("--drop-duplicates near needs datasketch: pip install 'steptron[dedup]'")


@cache
def _empty_sketch() -> "MinHash":
    from datasketch import MinHash

    return MinHash(num_perm=_BANDS * _ROWS, seed=1, scheme="affine32")


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
