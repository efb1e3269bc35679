"""Do the tests notice a fault? Plant one fault at a time in a copy of the tree and run the tests that should fail.

    python benchmarks/mutants.py [--jobs 2] [FILTER]

    benchmarks/mutants/*.toml ─► tests unmutated: all must pass ─► copy, plant, pytest -x, one by one ─► table, goals

An entry of a file is

    [[mutant]]
    name = "router biases never move"
    file = "steptron/train/step.py"
    old = '''…'''                                # occurs exactly once in the file
    new = '''…'''
    tests = ["tests/train/test_train_x.py"]     # pytest arguments
    survives = "why this one changes nothing"   # optional: accepted, but counted as a survivor

A mutant is killed when pytest fails or does not end. The checkout is never changed: a mutant lives in a temporary
folder, which PYTHONPATH names first. FILTER keeps mutants whose name or file contains it.

Goal: at least 95 % killed. Exit codes: 0 goal met, 1 goal missed, 2 an entry is wrong or its tests fail
without the mutant.
"""

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
GOAL = 0.95
COPIED = "steptron tests recipes benchmarks launch slurm docs README.md Makefile pyproject.toml constraints.txt".split()
"""Everything that a test reads."""
PATIENCE_S = 900.0
"""Seconds after which the tests of a mutant count as a hang."""


class EntryError(Exception):
    """An entry that cannot be used; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One fault to plant."""

    name: str
    file: str
    """Path from the root of the tree."""
    old: str
    """Text that occurs exactly once in the file."""
    new: str
    tests: tuple[str, ...]
    """Arguments of pytest."""
    survives: str = ""
    """Why no test fails, where that is accepted."""

    def mutated(self, root: Path) -> str:
        """Return the file's text with the fault. Raises `EntryError` where the entry does not fit the tree."""
        path = root / self.file
        if not path.is_file():
            raise EntryError(f"{self.name}: there is no file {self.file}")
        text = path.read_text()
        if (times := text.count(self.old)) != 1:
            raise EntryError(f"{self.name}: `old` occurs {times} times in {self.file}; it must occur once")
        mutated = text.replace(self.old, self.new)
        if mutated == text:
            raise EntryError(f"{self.name}: `new` is the same as `old`")
        if path.suffix == ".py":
            try:
                ast.parse(mutated)
            except SyntaxError as error:
                raise EntryError(f"{self.name}: with `new`, {self.file} is not Python: {error}") from error
        for test in self.tests:
            if test.startswith("tests/") and not (root / test.partition("::")[0]).is_file():
                raise EntryError(f"{self.name}: there is no test file {test}")
        return mutated


class Outcome(NamedTuple):
    """The result of pytest on one mutant."""

    passed: bool
    test: str
    """The first that failed; empty where all passed."""
    message: str
    """First line of the failure."""
    seconds: float


def read_mutants(folder: Path) -> list[Mutant]:
    """Return the entries of all files of the folder, in order of files. Raises `EntryError`."""
    found = []
    for path in sorted(folder.glob("*.toml")):
        try:
            for entry in tomllib.loads(path.read_text())["mutant"]:
                found.append(Mutant(**(entry | {"tests": tuple(entry["tests"])})))
        except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
            raise EntryError(f"{path.name} has an entry that is no mutant: {error}") from error
    names = [mutant.name for mutant in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise EntryError(f"{twice[0]}: two entries have this name")
    return found


@contextmanager
def copied(root: Path) -> Iterator[Path]:
    """A copy of the tree in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (root / name).exists():
                shutil.copy2(root / name, tree / name)
        yield tree


def run_tests(tree: Path, tests: Iterable[str], timeout_s: float) -> Outcome:
    """Run pytest in a tree until the first failure."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", "--color=no", *tests]
    # A failure's first line is cut at the width of the terminal.
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    environment.pop("PYTEST_ADDOPTS", None)
    start = time.monotonic()
    process = subprocess.Popen(
        words,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Outcome(False, "", f"hang: not done after {timeout_s:.0f} s", timeout_s)
    seconds = time.monotonic() - start
    if process.returncode == 0:
        return Outcome(True, "", "", seconds)
    failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - (.*))?$", output, re.MULTILINE)
    last = (output.strip().splitlines() or ["pytest says nothing"])[-1]
    test, message = (failed[1], failed[2] or last) if failed else ("", last)
    return Outcome(False, test, message, seconds)


def try_mutant(root: Path, mutant: Mutant, timeout_s: float) -> Outcome:
    """Run the mutant's tests in a copy that has the fault."""
    with copied(root) as tree:
        (tree / mutant.file).write_text(mutant.mutated(root))
        return run_tests(tree, mutant.tests, timeout_s)


def check_unmutated(root: Path, mutants: list[Mutant]) -> None:
    """Run the tests of all mutants in a copy that has none. Raises `EntryError` where one fails."""
    sets = dict.fromkeys(mutant.tests for mutant in mutants)
    plain = [tests for tests in sets if not any(argument.startswith("-") for argument in tests)]
    run_on_all_ranks = tuple(dict.fromkeys(argument for tests in plain for argument in tests))  # one start-up for all
    for tests in (run_on_all_ranks, *(tests for tests in sets if tests not in plain)):
        with copied(root) as tree:
            outcome = run_tests(tree, tests, timeout_s=PATIENCE_S * len(mutants)) if tests else None
        if outcome is not None and not outcome.passed:
            raise EntryError(f"{outcome.test or ' '.join(tests)} fails without a mutant: {outcome.message}")


def try_all(root: Path, mutants: list[Mutant], jobs: int, tell: Callable[[str], None]) -> list[Outcome]:
    """Return the outcome of each mutant, after a run without any. Raises `EntryError`."""
    for mutant in mutants:
        mutant.mutated(root)
    check_unmutated(root, mutants)
    tell("without a mutant, all tests pass")

    def attempt(mutant: Mutant) -> Outcome:
        outcome = try_mutant(root, mutant, PATIENCE_S)
        tell(f"{'SURVIVED' if outcome.passed else 'killed'}: {mutant.name} ({outcome.seconds:.0f} s)")
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(attempt, mutants))


def show(mutants: list[Mutant], outcomes: list[Outcome], console: Console) -> bool:
    """Print the table and the goal. Returns whether it is met."""
    table = Table(title="one fault at a time", show_lines=True)
    for column in ("mutant", "file", "first test that fails", "its message"):
        table.add_column(column, overflow="fold")
    for mutant, outcome in zip(mutants, outcomes, strict=True):
        test = "SURVIVED" if outcome.passed else outcome.test
        message = mutant.survives or "no reason is known" if outcome.passed else outcome.message
        table.add_row(*(cell.replace("[", r"\[") for cell in (mutant.name, mutant.file, test, message[:200])))
    console.print(table)
    killed = sum(not outcome.passed for outcome in outcomes)
    met = killed >= GOAL * len(mutants)
    console.print(f"goals: {int(met)} of 1 met (at least {GOAL:.0%} killed: {killed} of {len(mutants)})", markup=False)
    return met


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("filter", nargs="?", default="", help="part of a mutant's name or file")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    args = parser.parse_args(arguments)
    try:
        mutants = [m for m in read_mutants(root / "benchmarks" / "mutants") if args.filter in m.name + "\n" + m.file]
        if not mutants:
            raise EntryError(f"no mutant's name or file contains {args.filter!r}")
        outcomes = try_all(root, mutants, args.jobs, lambda line: print(line, file=sys.stderr, flush=True))
    except EntryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Where the table goes into a file, its lines are not cut at 80 columns.
    return 0 if show(mutants, outcomes, Console(width=None if sys.stdout.isatty() else 200)) else 1


if __name__ == "__main__":
    sys.exit(main())
