"""Back to a checkpoint before the trouble, and past the data that was read in it.

    decision (first bad step) ─► newest whole checkpoint before it ─► weights, optimizer, counters, detectors
                              └► samples read in the bad steps ─► a window that the run leaves out from now on ─► ledger

The ledger is what a resumed run takes the windows from: it holds them also where the run ends before its next checkpoint.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from steptron.config.schema import StageConfig
from steptron.monitor import ledger
from steptron.train.state import Counters, Window, samples_of_steps


def windows_in_ledger(folder: Path) -> list[Window]:
    """Samples that rewinds so far have left out, in the order of the rewinds."""
    return [Window(*window) for event in ledger.read(folder, "rewind") for window in event["windows"]]


def rewinds_in_ledger(folder: Path) -> int:
    """Rewinds so far."""
    return len(ledger.read(folder, "rewind"))


def bad_windows(
    stages: Mapping[str, StageConfig], start: Counters, windows: Iterable[Window], since: int, before: int, step: int
) -> list[Window]:
    """Samples of the steps from `before` steps before the first bad one, `since`, to the last one, `step`.

    `start`: counters of the checkpoint that the run goes back to."""
    steps = range(max(start.step + 1, since - before), step + 1)
    return samples_of_steps(stages, start, list(windows), steps)
