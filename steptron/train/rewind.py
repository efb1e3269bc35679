"""Back to a checkpoint before the trouble, and past the data that was read in it.

    decision (first bad step) ─► newest whole checkpoint before it ─► weights, optimizer, counters, detectors
                              └► samples read in the bad steps ─► a window that the run leaves out from now on ─► ledger

The ledger is what a resumed run takes the windows from: it holds them also where the run ends before its next checkpoint.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steptron.checkpoint.manifest import NAME, has_all_bytes, list_checkpoints, read_manifest, step_of
from steptron.config.schema import StageConfig
from steptron.monitor.storage import ledger
from steptron.train.state import Counters, Window, samples_of_steps


def windows_in_ledger(folder: Path) -> list[Window]:
    """Samples that rewinds so far have left out, in the order of the rewinds."""
    return [Window(*window) for event in ledger.read(folder, "rewind") for window in event["windows"]]


def rewinds_in_ledger(folder: Path) -> int:
    """Rewinds so far."""
    return len(ledger.read(folder, "rewind"))


def unrecorded(folder: Path, last: int) -> list[tuple[int, dict[str, Any]]]:
    """Return step and evidence of each checkpoint up to step `last` that has all its files, and no line in the ledger.

    The process was killed between its rename and its line. A line of a past that the run has gone back from does not count."""
    known: set[int] = set()
    for line in ledger.read(folder, "checkpoint", "rewind", "resume"):
        if line["event"] == "checkpoint":
            known.add(line["step"])
        else:
            back = line["to"] if line["event"] == "rewind" else line["step"]
            known = {step for step in known if step <= back}
    found = []
    for path in reversed(list_checkpoints(folder / "checkpoints")):
        if 0 <= step_of(path) <= last and step_of(path) not in known and has_all_bytes(path):
            manifest, written = read_manifest(path), (path / NAME).stat().st_mtime
            evidence = {
                "path": path.name,
                "bytes": sum(entry.bytes for entry in manifest.files.values()),
                "written": datetime.fromtimestamp(written, UTC).isoformat(timespec="milliseconds"),
                "found": "at the next start: the process that wrote it ended before it could say so",
            }
            found.append((manifest.step, evidence))
    return found


def bad_windows(
    stages: Mapping[str, StageConfig], start: Counters, windows: Iterable[Window], since: int, before: int, step: int
) -> list[Window]:
    """Samples of the steps from `before` steps before the first bad one, `since`, to the last one, `step`.

    `start`: counters of the checkpoint that the run goes back to."""
    steps = range(max(start.step + 1, since - before), step + 1)
    return samples_of_steps(stages, start, list(windows), steps)
