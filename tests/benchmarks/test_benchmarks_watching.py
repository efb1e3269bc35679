"""The benchmark of what watching costs tells a cost from none: planted seconds come out as the ratio and the exit code
that they should.

One short real run shows that the steps are taken in turn; its ratio is for a quiet machine, and is not looked at
here."""

import multiprocessing
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import watching

from ranks import context

PIECES = (0.2, 0.3, 0.1)
"""Seconds of a step without watching: two micro-batches, then the update."""


class Line:
    """The line to a process whose pieces take planted times."""

    def __init__(self, level: str, factor: float, noise: Iterator[float]):
        self.level, self.factor, self.noise = level, factor, noise
        self.asked = 0
        self.told = False

    def send(self, word: str) -> None:
        self.asked += 1

    def recv(self):
        if not self.told:
            self.told = True
            return 1234 if self.level == "full" else 0
        piece = (self.asked - 1) % len(PIECES)
        # The first pairs warm up: they take ten times as long, and watching them a hundred times.
        warm = self.asked > watching.WARM_UP * len(PIECES)
        slow = 1.0 if warm else (100.0 if self.level == "full" else 10.0)
        return PIECES[piece] * self.factor * slow + next(self.noise), piece == len(PIECES) - 1


def planted(monkeypatch: pytest.MonkeyPatch, factor: float, noise: tuple[float, ...] = (0.0,)) -> None:
    """Have rounds take planted times, those of watching `factor` times as long."""

    def endless() -> Iterator[float]:
        while True:
            yield from noise

    @contextmanager
    def working(recipe, level, folder):
        yield Line(level, factor if level == "full" else 1.0, endless())

    monkeypatch.setattr(watching, "working", working)
    monkeypatch.setattr(sys, "argv", ["watching.py", "--recipe", "demo", "--rounds", "2", "--pairs", "3"])


@pytest.mark.parametrize(
    ("factor", "goals"),
    [(1.0, 1), (1.019, 1), (1.021, 0), (1.2, 0), (0.97, 1)],
    ids="none below above much less".split(),
)
def test_a_planted_cost_is_what_is_printed(monkeypatch, capsys, factor: float, goals: int):
    planted(monkeypatch, factor)
    assert watching.main() == 1 - goals
    shown = capsys.readouterr().out
    row = re.findall(r"\d+\.\d+", next(line for line in shown.splitlines() if " to " in line))
    off, full, ratio, low, high, fastest = map(float, row)
    assert (off, full) == (pytest.approx(0.6, abs=1e-3), pytest.approx(0.6 * factor, abs=1e-3))
    assert [ratio, low, high, fastest] == pytest.approx([factor] * 4, abs=1e-4)
    assert f"medians of rounds: {ratio:.4f}, {ratio:.4f}" in shown
    assert "1,234 values a step, 2 rounds of 3 pairs" in " ".join(shown.split())
    assert shown.splitlines()[-1] == f"goals: {goals} of 1 met (full ÷ off at most 1.02)"


def test_a_disturbed_pair_moves_the_median_little(monkeypatch):
    """One piece in 17 takes a second longer, whosever turn it is."""
    planted(monkeypatch, 1.0, (1.0, *[0.0] * 16))
    assert watching.main() == 0


def test_ratios_are_of_pairs():
    taken = {"off": [[1.0, 1.0], [4.0]], "full": [[1.5, 1.5], [2.0]]}
    assert watching.ratios(taken) == [1.5, 0.5]


def test_it_steps_in_turn_and_says_what_it_found(monkeypatch, capsys):
    """Its two processes are forks of the tests' server here."""
    small = ("stages.base.ramp.0.batch_size=4", "stages.base.micro_batch=4")
    server = context()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: server)
    monkeypatch.setattr(sys, "argv", ["watching.py", "--recipe", "demo", "--rounds", "1", "--pairs", "2", *small])
    code = watching.main()
    shown = capsys.readouterr().out
    row = re.findall(r"\d+\.\d+", next(line for line in shown.splitlines() if " to " in line))
    off, full, ratio, low, high, _ = map(float, row)
    assert 0 < off < 100
    assert 0 < full < 100
    assert low <= ratio <= high
    assert code == (0 if ratio <= watching.GOAL else 1)
    assert shown.splitlines()[-1].startswith(f"goals: {1 - code} of 1 met")
