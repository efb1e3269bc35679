"""The ranks whose values are stored, by step.

Steps with the same ranks are stored as runs, so that a million steps need little memory.

    [[1, 400, "0-15"], [401, 401, "0-2,4-15"], [402, 800, "0-15"], [401, 401, "3"]]     first step, last step, ranks

The metadata of files has the same form. A step may be in several runs: a frame that came late adds one.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Any


class Coverage:
    """The steps and ranks whose values exist."""

    def __init__(self, runs: Iterable[tuple[int, int, str]] = ()):
        self._runs: list[tuple[int, int, frozenset[int]]] = []
        for first, last, ranks in runs:
            self._append(first, last, frozenset(parse_ranks(ranks)))

    def add(self, step: int, ranks: Collection[int]) -> None:
        """Record that the values of `ranks` exist for `step`."""
        self._append(step, step, frozenset(ranks))

    def update(self, other: "Coverage") -> None:
        """Add everything that `other` contains."""
        for first, last, ranks in other._runs:
            self._append(first, last, ranks)

    def ranks(self, step: int) -> frozenset[int]:
        """Return the ranks whose values of `step` exist."""
        found: frozenset[int] = frozenset()
        for first, last, ranks in self._runs:
            if first <= step <= last:
                found = found | ranks
        return found

    def truncate_after(self, step: int) -> None:
        """Drop the later steps."""
        self._runs = [(first, min(last, step), ranks) for first, last, ranks in self._runs if first <= step]

    def __iter__(self) -> Iterator[tuple[int, frozenset[int]]]:
        """Yield the steps in ascending order, with their ranks."""
        for step in sorted({step for first, last, _ in self._runs for step in range(first, last + 1)}):
            yield step, self.ranks(step)

    def to_json(self) -> list[Any]:
        """Return the runs in the form above."""
        return [[first, last, format_ranks(ranks)] for first, last, ranks in self._runs]

    def _append(self, first: int, last: int, ranks: frozenset[int]) -> None:
        # Steps are added in order, so a new step nearly always extends the last run.
        if self._runs and self._runs[-1][2] == ranks and self._runs[-1][1] + 1 == first:
            self._runs[-1] = (self._runs[-1][0], last, self._runs[-1][2])
        else:
            self._runs.append((first, last, ranks))


def format_ranks(ranks: Iterable[int]) -> str:
    """Return `0-3,8` for 0, 1, 2, 3 and 8."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] + 1 == rank:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def parse_ranks(text: str) -> Iterator[int]:
    """Return the inverse of `format_ranks`."""
    for span in filter(None, text.split(",")):
        first, _, last = span.partition("-")
        yield from range(int(first), int(last or first) + 1)
