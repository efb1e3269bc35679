"""What ranks send is counted, not timed, and so it is checked here too: the benchmark's goals are met."""

import sys
from pathlib import Path

import pytest

from forks import run

pytestmark = pytest.mark.takes(30)

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "wire.py"


def test_bytes_on_the_wire_are_what_theory_says():
    done = run([sys.executable, SCRIPT])
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.rstrip().splitlines()[-1] == "goals: 18 of 18 met"
