"""A histogram of document lengths in powers of two.

lengths → buckets 0, 1, 2–3, 4–7, 8–15, … tokens → documents and tokens in each
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

_BUCKETS = 64


class Bucket(NamedTuple):
    """The documents of low to high tokens, both included."""

    low: int
    high: int
    num_documents: int
    num_tokens: int


def histogram(lengths: Iterable[np.ndarray]) -> list[Bucket]:
    """Return the buckets from the shortest document to the longest. `lengths`: arrays of tokens per document."""
    documents, tokens = np.zeros(_BUCKETS, dtype=np.int64), np.zeros(_BUCKETS, dtype=np.int64)
    for part in lengths:
        bucket = np.frexp(part.astype(np.float64))[1]  # 2^(k-1) ≤ length < 2^k gives k, and 0 gives 0
        documents += np.bincount(bucket, minlength=_BUCKETS)
        np.add.at(tokens, bucket, part)
    [used] = np.nonzero(documents)
    if not len(used):
        return []
    return [
        Bucket(2**k // 2, max(2**k - 1, 0), int(documents[k]), int(tokens[k]))
        for k in range(int(used[0]), int(used[-1]) + 1)
    ]
