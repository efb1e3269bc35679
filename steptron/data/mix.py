"""The source of the n-th sample of a stage, as a pure function of (weights, n).

    weights ─► two groups of sources: the first has round(n · its weight) of the first n samples, the second the others
    group ─┬─► one source
           └─► more: blocks of its samples, each ordered by deadlines between two states that depend on the block only

Of the first n samples, each source has its share of n, give or take one sample at most, for every n. Tijdeman ("The
chairman assignment problem", 1980) shows that this is possible. It asks that sample c of a source (from 0) stands in
the window of places from its release, the first n with (n + 1) · weight > c, to its deadline, the last n with
n · weight < c + 1. Serving the earliest deadline first keeps all windows (Baruah et al., "Proportionate progress",
1996), but one place depends on all places before it.

A block breaks this chain. Its length is at least twice the longest window. A run of deadlines that starts one block
earlier, from counts that keep all later windows, has forgotten its start when it reaches the block: what it has served
there keeps the windows on both sides. The order in the block is then served between the counts at both of its ends. So
any place costs three blocks at most, and a mixture has no state.

Rare sources have long windows. They are a group of their own, whose blocks are long too, but are needed for its samples
only. A group with weight W has ⌊nW⌋ or ⌈nW⌉ of the first n samples. Between places a and b it has thus at least
Σ⌊b · weight⌋ − Σ⌈a · weight⌉ samples, the number of windows that lie there: the windows of all its sources can be kept
with its samples alone.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush

ORDER = 3
"""The version of the order of samples. It is part of the fingerprint of the data: a run keeps its order."""
_UNIT = 2**60
"""The sum of the weights as integers: a weight is exact to 1e-18."""
_SHORTEST, _LONGEST = 64, 2**20
"""The limits of a block's length, in samples of its group. A source that has less than 2 / _LONGEST of the samples of
its group is not held within one sample."""
_RARE = 2 / 1024
"""A source with a smaller share is rare: without it, the blocks of the others have at most 1024 samples."""
_MOST = 2**40
"""The largest number of samples in a stage."""


class Mixture:
    """Weighted interleaving of sources. Each source's ordinals are 0, 1, 2, …, without gaps or repeats."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Prepare the order. `weights`: the share of each source by name, ≥ 0, of any positive sum."""
        assert sum(weights.values()) > 0, f"weights need a positive sum: {dict(weights)}"
        assert min(weights.values()) >= 0, f"weights must be ≥ 0: {dict(weights)}"
        self._unused = tuple(name for name, weight in weights.items() if not weight)
        # Heavy sources first. A recipe that lists them in another order is the same recipe.
        drawn = sorted((name for name in weights if weights[name]), key=lambda name: (-weights[name], name))
        shares = _integers([weights[name] for name in drawn])
        # The first source of the second group. Where all are rare, half of them are there.
        rare = 1 if len(shares) < 3 else sum(share >= _RARE * _UNIT for share in shares) or len(shares) // 2
        self._groups = [_Group(shares[:rare], True)] + ([_Group(shares[rare:], False)] if shares[rare:] else [])
        self._members = [drawn[:rare], drawn[rare:]]

    def locate(self, index: int) -> tuple[str, int]:
        """Return the source of sample `index` (≥ 0), and the sample's ordinal among that source's samples."""
        assert 0 <= index < _MOST, f"sample index {index} outside of 0 … {_MOST}"
        first = self._groups[0]
        sample = first.size(index)
        if first.size(index + 1) > sample:
            source, ordinal = first.locate(sample)
            return self._members[0][source], ordinal
        source, ordinal = self._groups[1].locate(index - sample)
        return self._members[1][source], ordinal

    def counts(self, length: int) -> dict[str, int]:
        """Return the number of samples of each source among the first `length` samples, by name in their order."""
        found = dict.fromkeys(self._unused, 0)
        for group, names in zip(self._groups, self._members, strict=False):
            found |= dict(zip(names, group.counts(group.size(length)), strict=True))
        return dict(sorted(found.items()))


class _Group:
    """The order of some sources among their own samples."""

    def __init__(self, shares: Sequence[int], first: bool) -> None:
        """Prepare the order. `first`: if false, the group has the samples that the first group does not have."""
        self._shares, self._is_first = shares, first
        self._weight = sum(shares)
        self._length = _SHORTEST
        while self._length * min(shares) < 2 * self._weight and self._length < _LONGEST:
            self._length *= 2
        self._block = lru_cache(maxsize=4)(self._make_block)
        self._state = lru_cache(maxsize=4)(self._make_state)

    def size(self, length: int) -> int:
        """Return the number of the group's samples among the first `length` samples of all."""
        if self._is_first:
            return (2 * length * self._weight + _UNIT) // (2 * _UNIT)
        return length - (2 * length * (_UNIT - self._weight) + _UNIT) // (2 * _UNIT)

    def locate(self, sample: int) -> tuple[int, int]:
        """Return source and ordinal of a sample of the group."""
        if len(self._shares) == 1:
            return 0, sample
        number, place = divmod(sample, self._length)
        return self._block(number)[place]

    def counts(self, length: int) -> list[int]:
        """Return the number of samples of each source among the first `length` samples of the group."""
        if len(self._shares) == 1:
            return [length]
        number, place = divmod(length, self._length)
        found = list(self._state(number))
        for source, ordinal in self._block(number)[:place]:
            found[source] = ordinal + 1
        return found

    def _place(self, sample: int) -> int:
        """Return the place of a sample of the group among the samples of all: the last n with size(n) = sample."""
        middle = (2 * sample + 1) * _UNIT
        return -(-middle // (2 * self._weight)) - 1 if self._is_first else middle // (2 * self._weight)

    def _make_block(self, number: int) -> list[tuple[int, int]]:
        """Return source and ordinal of each sample of a block."""
        return self._serve(number * self._length, self._state(number), self._state(number + 1))

    def _make_state(self, number: int) -> list[int]:
        """Return the number of samples of each source before a block."""
        if not number:
            return [0] * len(self._shares)
        start = (number - 1) * self._length
        counts = self._counts_by_deadline(start)
        for source, ordinal in self._serve(start, counts):
            counts[source] = ordinal + 1
        return counts

    def _counts_by_deadline(self, length: int) -> list[int]:
        """Return counts of the first `length` samples that keep all later windows: of the samples whose window has
        begun, those with the earliest deadlines are served."""
        place = self._place(length)
        counts = [place * share // _UNIT for share in self._shares]
        begun = [source for source, share in enumerate(self._shares) if place * share % _UNIT]
        begun.sort(key=lambda source: self._deadline(source, counts[source]))
        for source in begun[: length - sum(counts)]:
            counts[source] += 1
        return counts

    def _serve(self, start: int, counts: Sequence[int], until: Sequence[int] | None = None) -> list[tuple[int, int]]:
        """Return source and ordinal of the samples of the block from `start` on, earliest deadline first.

        `counts`: the samples of each source before it. `until`: the counts after it; None leaves them open.
        """
        waiting = [(self._release(source, count), source, count) for source, count in enumerate(counts)]
        if until is not None:
            waiting = [(release, source, count) for release, source, count in waiting if count < until[source]]
        heapify(waiting)
        ready: list[tuple[int, int, int]] = []
        served: list[tuple[int, int]] = []
        for sample in range(start, start + self._length):
            place = self._place(sample)
            while waiting and (waiting[0][0] <= place or not ready):
                _, source, count = heappop(waiting)
                heappush(ready, (self._deadline(source, count), source, count))
            _, source, count = heappop(ready)
            served.append((source, count))
            if until is None or count + 1 < until[source]:
                heappush(waiting, (self._release(source, count + 1), source, count + 1))
        return served

    def _release(self, source: int, ordinal: int) -> int:
        """Return the first place at which a sample does not make its source early by one."""
        return ordinal * _UNIT // self._shares[source]

    def _deadline(self, source: int, ordinal: int) -> int:
        """Return the number of places by which a sample must be served, so that its source is not late by one."""
        return -(-(ordinal + 1) * _UNIT // self._shares[source])


def _integers(weights: Sequence[float]) -> list[int]:
    """Return the weights as positive integers with the sum _UNIT."""
    total = sum(weights)
    shares = [max(1, round(weight / total * _UNIT)) for weight in weights]
    shares[0] += _UNIT - sum(shares)
    return shares
