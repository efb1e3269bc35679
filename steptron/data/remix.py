"""A stage whose mix was changed at a sample, as a fork may do.

    sample index ─► the part that it is in ─► that part's mixture ─► source, ordinal in the part + all ordinals before

Each source continues with its next sample: none is lost or repeated where the mix changes.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol


class Mixed(Protocol):
    """A mixture of sources (`Mixture`)."""

    def locate(self, index: int) -> tuple[str, int]:
        """Return the source of a sample, and the sample's ordinal among that source's samples."""
        ...

    def counts(self, length: int) -> dict[str, int]:
        """Return the number of samples of each source among the first `length` samples."""
        ...


class Remixed:
    """Mixtures one after the other. Each source's ordinals are 0, 1, 2, …, without gaps or repeats."""

    def __init__(self, parts: Sequence[tuple[int, Mixed]]) -> None:
        """Prepare the parts: the first sample of each, 0 for the first part and rising, and its mixture."""
        self._firsts = [first for first, _ in parts]
        assert self._firsts[0] == 0 and self._firsts == sorted(set(self._firsts)), f"parts begin at {self._firsts}"  # noqa: PT018
        self._mixtures = [mixture for _, mixture in parts]
        self._before: list[dict[str, int]] = [{}]
        for (first, mixture), (end, _) in pairwise(parts):
            self._before.append(_sum(self._before[-1], mixture.counts(end - first)))

    def locate(self, index: int) -> tuple[str, int]:
        """Return the source of a sample, and the sample's ordinal among that source's samples."""
        part = bisect_right(self._firsts, index) - 1
        name, ordinal = self._mixtures[part].locate(index - self._firsts[part])
        return name, ordinal + self._before[part].get(name, 0)

    def counts(self, length: int) -> dict[str, int]:
        """Return the number of samples of each source among the first `length` samples."""
        part = bisect_right(self._firsts, length) - 1
        return _sum(self._before[part], self._mixtures[part].counts(length - self._firsts[part]))


def _sum(one: dict[str, int], two: dict[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + two.get(name, 0) for name in {**one, **two}}
