"""Waits of tests. A deadline only ends a hang, so one is enough for all; no test says how fast something has to be."""

import subprocess
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 600.0
"""Ten times what the slowest wait needs on two cores: a run of two ranks, or a job in Slurm's queue, takes up to a
minute. pytest's own timeout (pyproject.toml) is longer, so that a wait that ends says what did not come."""


def wait_until(
    condition: Callable[[], T],
    what: str = "it",
    running: Iterable[subprocess.Popen] = (),
    pause_s: float = 0.02,
) -> T:
    """Poll a condition and return what it gives once that is true.

    Raises `AssertionError` that names `what` did not come, or which of the processes that should be `running` has
    ended."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        for process in running:
            assert process.poll() is None, (
                f"{what} did not come: {process.args} exited with {process.returncode}: {process.communicate()}"
            )
        assert time.monotonic() < deadline, f"{what} did not come within {PATIENCE_S:g} s"
        time.sleep(pause_s)
    return found
