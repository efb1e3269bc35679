"""The source of the n-th sample of a stage, as a pure function of (weights, n).

    weights ─┬─► two sources: the first has round(n · weight) of the first n samples
             ├─► more: blocks of samples, each ordered by deadlines between two states that depend on the block only
             └─► sources too rare for a block: one common place in the order, which a mixture of their own divides

Of the first n samples, each source has its share of n, give or take one sample at most, for every n (two in a mix with
a source that is too rare for a block). Tijdeman ("The chairman assignment problem", 1980) shows that this is possible.
It asks that sample c of a source (from 0) stands in the window of places from its release, the first n with (n + 1) ·
weight > c, to its deadline, the last n with n · weight < c + 1. Serving the earliest deadline first keeps all windows
(Baruah et al., "Proportionate progress", 1996), but one place depends on all places before it.

A block breaks this chain. Its length is at least twice the longest window. A run of deadlines that starts one block
earlier, from counts that keep all later windows, has forgotten its start when it reaches the block: what it has served
there keeps the windows on both sides. The order in the block is then served between the counts at both of its ends. So
any place costs three blocks at most, and a mixture has no state.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush

ORDER = 2
"""The version of the order of samples. It is part of the fingerprint of the data: a run keeps its order."""
_UNIT = 2**60
"""The sum of the weights as integers: a weight is exact to 1e-18."""
_SHORTEST, _LONGEST = 64, 4096
"""The limits of a block's length, in samples. The shares of all sources in blocks are at least 2 / _LONGEST."""
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
        groups = _groups([weights[name] / sum(weights.values()) for name in drawn])
        self._members = [[drawn[place] for place in group] for group in groups]
        self._inner = [Mixture({n: weights[n] for n in names}) if len(names) > 1 else None for names in self._members]
        shares = _integers([sum(weights[name] for name in names) for names in self._members])
        self._order = _Pair(shares) if len(shares) < 3 else _Blocks(shares)

    def locate(self, index: int) -> tuple[str, int]:
        """Return the source of sample `index` (≥ 0), and the sample's ordinal among that source's samples."""
        assert 0 <= index < _MOST, f"sample index {index} outside of 0 … {_MOST}"
        group, ordinal = self._order.locate(index)
        inner = self._inner[group]
        return inner.locate(ordinal) if inner else (self._members[group][0], ordinal)

    def counts(self, length: int) -> dict[str, int]:
        """Return the number of samples of each source among the first `length` samples, by name in their order."""
        found = dict.fromkeys(self._unused, 0)
        for count, inner, names in zip(self._order.counts(length), self._inner, self._members, strict=True):
            found |= inner.counts(count) if inner else {names[0]: count}
        return dict(sorted(found.items()))


class _Pair:
    """The order of one or two sources."""

    def __init__(self, shares: Sequence[int]) -> None:
        self._shares = shares

    def counts(self, length: int) -> list[int]:
        first = self._first(length)
        return [first, length - first][: len(self._shares)]

    def locate(self, index: int) -> tuple[int, int]:
        first = self._first(index)
        return (0, first) if self._first(index + 1) > first else (1, index - first)

    def _first(self, length: int) -> int:
        """Return the number of samples of the first source among the first `length` samples."""
        return (2 * length * self._shares[0] + _UNIT) // (2 * _UNIT)


class _Blocks:
    """The order of three or more sources."""

    def __init__(self, shares: Sequence[int]) -> None:
        self._shares = shares
        self._length = _SHORTEST
        while self._length * min(shares) < 2 * _UNIT and self._length < _LONGEST:
            self._length *= 2
        self._block = lru_cache(maxsize=4)(self._make_block)
        self._state = lru_cache(maxsize=4)(self._make_state)

    def locate(self, index: int) -> tuple[int, int]:
        number, place = divmod(index, self._length)
        served = self._block(number)
        return served[place]

    def counts(self, length: int) -> list[int]:
        number, place = divmod(length, self._length)
        found = list(self._state(number))
        for source, ordinal in self._block(number)[:place]:
            found[source] = ordinal + 1
        return found

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
        counts = [length * share // _UNIT for share in self._shares]
        begun = [source for source, share in enumerate(self._shares) if length * share % _UNIT]
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
        for place in range(start, start + self._length):
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


def _groups(shares: Sequence[float]) -> list[list[int]]:
    """Return the numbers of the sources of each place in the order. Those that are too rare for a block share the last
    place, together with so many others that it is not. `shares` fall and have the sum 1."""
    places = list(range(len(shares)))
    own = sum(share * _LONGEST >= 2 for share in shares)
    if len(shares) < 3 or own == len(shares):
        return [[place] for place in places]
    if not own:
        return [places[: len(shares) // 2], places[len(shares) // 2 :]]
    while own > 1 and sum(shares[own:]) * _LONGEST < 2:
        own -= 1
    return [[place] for place in places[:own]] + [places[own:]]


def _integers(weights: Sequence[float]) -> list[int]:
    """Return the weights as positive integers with the sum _UNIT."""
    total = sum(weights)
    shares = [max(1, round(weight / total * _UNIT)) for weight in weights]
    shares[0] += _UNIT - sum(shares)
    return shares
