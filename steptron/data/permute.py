"""Pseudo-random numbers and orders without state: a value is a function of its key, so nothing has to be saved.

key (words and numbers) → digest → 64-bit number
(index, size, key) → Feistel network → the index-th element of a shuffled range(size), in no memory
"""

import hashlib
from functools import lru_cache

_MASK = 2**64 - 1
_FACTOR = 0xD6E8FEB86659FD93
_TURNS = tuple(turn << 48 for turn in range(6))


@lru_cache(maxsize=1024, typed=True)
def number(*key: str | int) -> int:
    """Return a 64-bit number that depends on `key` only."""
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(index: int, size: int, key: int) -> int:
    """Return element `index` of a pseudo-random order of range(size), a bijection for every key.

    A balanced Feistel network over the next even power of two; values outside the range are sent through again (cycle
    walking), at most four times on average. Time and memory do not depend on size.
    """
    assert 0 <= index < size, f"index {index} outside of range({size})"
    half_bits = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half_bits) - 1
    value = index
    while True:
        left, right = value >> half_bits, value & mask
        for turn in _TURNS:
            # Multiply and fold the high bits down, twice: each input bit reaches all low bits. All in one function,
            # as calls take half the time of a sample's place.
            mixed = (right + turn ^ key) * _FACTOR & _MASK
            mixed = (mixed ^ mixed >> 32) * _FACTOR
            left, right = right, left ^ (mixed ^ mixed >> 32) & mask
        value = left << half_bits | right
        if value < size:
            return value
