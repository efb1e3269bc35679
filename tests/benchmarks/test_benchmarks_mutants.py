"""The mutants fit the tree as it is, and the harness tells a killed one from a survivor, on a package of two files."""

from pathlib import Path

import mutants
import pytest

CODE = "def larger(a, b):\n    return a if a > b else b\n\n\ndef unseen():\n    return 1\n"
TEST = """
import time
from steptron.code import larger

def test_the_larger_one():
    started = time.monotonic()
    while larger(1, 2) == 0 and time.monotonic() < started + 60:
        pass
    assert larger(1, 2) == 2
"""


def entry(name: str, old: str, new: str, **more: str) -> str:
    values = {"name": name, "file": "steptron/code.py", "old": old, "new": new} | more
    return "\n".join(
        [
            "[[mutant]]",
            *(f"{key} = '''{value}'''" for key, value in values.items()),
            'tests = ["tests/test_code.py"]',
            "",
        ]
    )


KILLED = entry("smaller instead", "a > b", "a < b")
SURVIVOR = entry("unseen", "return 1", "return 2", survives="nobody calls it")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one module, one test and no mutants. Its pytest loads no plugins, which take two seconds."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for name, text in {"steptron/__init__.py": "", "steptron/code.py": CODE, "tests/test_code.py": TEST}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "benchmarks" / "mutants").mkdir(parents=True)
    return tmp_path


def write(tree: Path, *entries: str) -> None:
    (tree / "benchmarks" / "mutants" / "all.toml").write_text("\n".join(entries))


def test_every_entry_fits_the_tree():
    found = mutants.read_mutants(mutants.ROOT / "benchmarks" / "mutants")
    assert len(found) >= 40
    for mutant in found:
        assert mutant.mutated(mutants.ROOT)
        assert mutant.tests, f"{mutant.name} names no test"


def test_a_killed_mutant_and_a_survivor(tree: Path, capsys: pytest.CaptureFixture[str]):
    write(tree, KILLED, SURVIVOR)
    assert mutants.main([], tree) == 1
    shown = capsys.readouterr().out
    killed, survivor = (next(line for line in shown.splitlines() if name in line) for name in ("smaller", "unseen"))
    assert "tests/test_code.py::test_the_larger_one" in killed
    assert "assert 1 == 2" in killed
    assert "SURVIVED" in survivor
    assert "nobody calls it" in survivor
    assert shown.splitlines()[-1] == "goals: 0 of 1 met (at least 95% killed: 1 of 2)"
    assert (tree / "steptron" / "code.py").read_text() == CODE, "the checkout is as it was"
    assert mutants.main(["smaller", "--jobs", "1"], tree) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "goals: 1 of 1 met (at least 95% killed: 1 of 1)"


def test_a_hang_is_killed_and_shown_as_one(tree: Path, monkeypatch: pytest.MonkeyPatch):
    write(tree, entry("hangs", "a if a > b else b", "0"))
    (mutant,) = mutants.read_mutants(tree / "benchmarks" / "mutants")
    outcome = mutants.try_mutant(tree, mutant, timeout_s=3.0)
    assert (outcome.passed, outcome.test, outcome.message) == (False, "", "hang: not done after 3 s")


@pytest.mark.parametrize(
    ("entries", "words", "says"),
    [
        ([entry("twice", "a", "b")], [], "twice: `old` occurs 4 times in steptron/code.py; it must occur once"),
        ([entry("never", "a >= b", "b")], [], "never: `old` occurs 0 times in steptron/code.py; it must occur once"),
        ([entry("same", "a > b", "a > b")], [], "same: `new` is the same as `old`"),
        ([entry("broken", "a > b", "a >")], [], "broken: with `new`, steptron/code.py is not Python: "),
        ([KILLED, KILLED], [], "smaller instead: two entries have this name"),
        ([KILLED.replace("steptron/code.py", "steptron/gone.py")], [], "there is no file steptron/gone.py"),
        ([KILLED.replace("test_code", "test_gone")], [], "there is no test file tests/test_gone.py"),
        ([KILLED.replace("old =", "odl =")], [], "all.toml has an entry that is no mutant: "),
        ([KILLED], ["larger"], "no mutant's name or file contains 'larger'"),
    ],
    ids="twice never same broken two-names no-file no-test typo no-match".split(),
)
def test_a_wrong_entry_is_an_error_that_names_it(
    tree: Path, capsys: pytest.CaptureFixture[str], entries: list[str], words: list[str], says: str
):
    write(tree, *entries)
    assert mutants.main(words, tree) == 2
    assert says in capsys.readouterr().err


def test_tests_that_fail_without_a_mutant_are_an_error(tree: Path, capsys: pytest.CaptureFixture[str]):
    write(tree, KILLED)
    (tree / "tests" / "test_code.py").write_text(TEST.replace("== 2", "== 3"))
    assert mutants.main([], tree) == 2
    assert "tests/test_code.py::test_the_larger_one fails without a mutant: assert 2 == 3" in capsys.readouterr().err
