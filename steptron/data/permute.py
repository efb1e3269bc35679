"""Pseudo-random numbers and orders without state: a value is a function of its key, so nothing has to be saved.

key (words and numbers) → digest → 64-bit number
(index, size, key) → Feistel network → the index-th element of a shuffled range(size), in no memory
"""

import hashlib

_ROUNDS = 6
_MASK = 2**64 - 1


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
    value = index
    while True:
        value = _feistel(value, half_bits, key)
        if value < size:
            return value


def _feistel(value: int, half_bits: int, key: int) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for turn in range(_ROUNDS):
        left, right = right, left ^ (_scramble(right + (turn << 48) ^ key) & mask)
    return left << half_bits | right


def _scramble(value: int) -> int:
    # Multiply and fold the high bits down, twice: each input bit reaches all low bits.
    value = (value & _MASK) * 0xD6E8FEB86659FD93 & _MASK
    value = (value ^ value >> 32) * 0xD6E8FEB86659FD93 & _MASK
    return value ^ value >> 32
