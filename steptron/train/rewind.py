"""A rewind returns the run to a checkpoint before the bad steps, and leaves out the data that was read in them.

    decision (first bad step) ─► newest complete checkpoint before it ─► weights, optimizer, counters, detectors
                              └► samples read in the bad steps ─► a window that the run leaves out from now on ─► ledger

A resumed run reads the windows from the ledger, which has them even if the run ends before its next checkpoint. The
data of the steps in `data.skip` is left out in the same way, from the start of the process on.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steptron.checkpoint.manifest import NAME, has_all_bytes, list_checkpoints, read_manifest, step_of
from steptron.config.schema import Recipe, StageConfig
from steptron.data.curriculum import Window, coming_steps, samples_of_steps
from steptron.errors import RecipeError
from steptron.monitor.storage import ledger
from steptron.train.counters import Counters


def windows_in_ledger(folder: Path) -> list[Window]:
    """Return the samples that rewinds and `data.skip` have left out so far, in the order of the ledger.

    A fork leaves out those of its parent too.
    """
    windows: list[Window] = []
    for event in ledger.read(folder, "run_start", "fork", "rewind", "skip"):
        if event["event"] in ("run_start", "fork"):  # what stands before is of starts that failed
            windows = []
        windows += [Window(*window) for window in event.get("windows", ())]
    return windows


def skips_in_ledger(folder: Path) -> list[list[int]]:
    """Return the pairs of `data.skip` whose samples the run leaves out already. A fork has those of its parent too."""
    events = ledger.read(folder, "fork", "skip")
    return [pair for event in events for pair in (event["skips"] if event["event"] == "fork" else [event["steps"]])]


def skips(recipe: Recipe, folder: Path, start: Counters) -> list[tuple[list[int], list[Window]]]:
    """Return each pair of `data.skip` that the ledger does not have yet, with the samples that its steps would read.

    `start`: the counters of the step that the run continues from. Raises `RecipeError` if a pair of the ledger is
    missing in the recipe, or the steps of a new one are done already or not part of the run.
    """
    asked = [list(pair) for pair in recipe.data.skip]
    known = skips_in_ledger(folder)
    for pair in known:
        if pair not in asked:
            raise RecipeError(
                f"data.skip={asked} lacks {pair}, whose samples the run leaves out already; keep it in the list"
            )
    windows, found = windows_in_ledger(folder), []
    for first, last in (pair for pair in asked if pair not in known):
        if first <= start.step:
            raise RecipeError(
                f"data.skip: step {first} of [{first},{last}] is done, the run continues after step {start.step}; "
                f"continue from a checkpoint before it, with `steptron resume RUN_DIR --step N`"
            )
        if all(plan.step != last for plan in coming_steps(recipe.stages, start, windows)):
            raise RecipeError(
                f"data.skip: step {last} of [{first},{last}] is not part of the run, which ends before; name steps of "
                "the run"
            )
        found.append(([first, last], samples_of_steps(recipe.stages, start, windows, range(first, last + 1))))
    return found


def rewinds_in_ledger(folder: Path) -> int:
    """Return the number of rewinds so far."""
    return len(ledger.read(folder, "rewind"))


def unrecorded(folder: Path, last: int) -> list[tuple[int, dict[str, Any]]]:
    """Return step and evidence of each checkpoint up to step `last` that has all its files, but no line in the ledger.

    The process was killed after it renamed the folder and before it wrote the line. Lines of steps that a rewind or a
    resume has undone do not count.
    """
    known: set[int] = set()
    for line in ledger.read(folder, "checkpoint", "rewind", "resume", "fork"):
        if line["event"] in ("checkpoint", "fork"):
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
    """Return the samples of the steps from `since` - `before` to `step`. `since` is the first bad step.

    `start`: the counters of the checkpoint that the run returns to. No step up to it is included.
    """
    steps = range(max(start.step + 1, since - before), step + 1)
    return samples_of_steps(stages, start, list(windows), steps)
