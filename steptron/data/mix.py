"""The source of the n-th sample of a stage, as a pure function of (seed, stage, n).

    n → bits reversed, shifted by the seed → point in [0, 1) → the source whose share of [0, 1) holds the point
                                                             → ordinal: how many earlier points that share holds

The reversed bits (van der Corput's sequence in base 2, with a digital shift) fill [0, 1) evenly from the first point
on. Any prefix, and any run of samples, therefore follows the weights within a few samples; drawing at random would be
off by the square root of their number. The count of earlier points needs no scan: a share is a sum of dyadic intervals,
and the points in a dyadic interval are the n of one residue class modulo a power of two.
"""

from bisect import bisect_right
from collections.abc import Mapping

from steptron.data.permute import number

_BITS = 40
"""The binary places of points and shares: 2^40 samples per stage, weights exact to 1e-12."""


class Mixture:
    """Weighted interleaving of sources. Each source's ordinals are 0, 1, 2, …, without gaps or repeats."""

    def __init__(self, weights: Mapping[str, float], seed: int, stage: str) -> None:
        """Prepare the shares. `weights`: the share of each source by name, ≥ 0, of any positive sum."""
        total = sum(weights.values())
        assert total > 0, f"weights need a positive sum: {dict(weights)}"
        assert min(weights.values()) >= 0, f"weights must be ≥ 0: {dict(weights)}"
        self._names = tuple(sorted(weights))  # a recipe that lists them in another order is the same recipe
        self._shift = number("mixture", seed, stage) >> (64 - _BITS)
        self._edges, reached = [0], 0.0
        for name in self._names:
            reached += weights[name]
            self._edges.append(round(reached / total * 2**_BITS))
        self._edges[-1] = 2**_BITS
        self._residues = [self._dyadic(edge) for edge in self._edges]

    def locate(self, index: int) -> tuple[str, int]:
        """Return the source of sample `index` (≥ 0), and the sample's ordinal among that source's samples."""
        assert 0 <= index < 2**_BITS, f"sample index {index} outside of 0 … 2^{_BITS}"
        share = bisect_right(self._edges, _reverse(index, _BITS) ^ self._shift) - 1
        return self._names[share], self._below(index, share + 1) - self._below(index, share)

    def counts(self, length: int) -> dict[str, int]:
        """Return the number of samples of each source among the first `length` samples."""
        below = [self._below(length, edge) for edge in range(len(self._edges))]
        return {name: end - start for name, start, end in zip(self._names, below, below[1:], strict=False)}

    def _below(self, index: int, edge: int) -> int:
        """Return the number of points below an edge among the first `index` points."""
        return sum((index - residue + (1 << bits) - 1) >> bits for residue, bits in self._residues[edge])

    def _dyadic(self, edge: int) -> list[tuple[int, int]]:
        """Return [0, edge) as dyadic intervals: each (residue, bits) is the points with index ≡ residue modulo
        2^bits."""
        if edge == 2**_BITS:
            return [(0, 0)]
        classes = []
        for low in range(_BITS):
            if edge >> low & 1:
                leading = (edge >> low) ^ 1 ^ (self._shift >> low)
                classes.append((_reverse(leading, _BITS - low), _BITS - low))
        return classes


def _reverse(value: int, bits: int) -> int:
    return int(f"{value:0{bits}b}"[::-1], 2)
