"""ledger.jsonl: the events and decisions of a run; judged/: the statistics by which steps were judged.

    run_start, resume       the start of the process, and what it started from
    sources                 how each stage reads each source: tokens, epochs, the share of padding
    detectors               thresholds, policy and surroundings in force from here on (`policy.in_force`)
    stage_start             all the stage's settings
    stage_end               `peak_memory_gib`: the peak of each rank's memory in the stage, since the last start
    alarm, alarm_cleared    a detector's finding and its end (`Alarm.evidence`); `step` is the step that was judged
    decision                an action that was more than a warning (`Decision.evidence`); `judged`: the evidence file
                            of a step whose plane is not stored, because the step does not count
    rewind                  `to`: step of the checkpoint that the run returned to; `windows`: samples left out since
    skip                    `steps`: a pair of `data.skip`; `windows`: the samples of these steps, left out since
    new_layout              the end of the stages with one layout; `stage`: the next one, which a resume continues
                            with; `ranks`: its number of ranks
    step_repeated           forward and backward ran again, because some choices did not fit into the buffers of
                            `kernels.capacity`; `choices`: their number by layer; `step` is the repeated one
    evaluation              the losses on held-out text after that step, which `checkpoint.keep_best` compares
    checkpoint, checkpoint_skipped, run_end

In the other events `step` is the last finished step. A line is on disk before `write` returns, and is never changed
afterwards: a resumed run appends, and decisions in steps that a resume or a rewind has undone stay.
"""

import io
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from steptron.atomic import atomic_write, make_folder, sync
from steptron.monitor.storage import jsonl

FILE_NAME = "ledger.jsonl"
JUDGED = "judged"
"""The folder beside it with the evidence of judged steps."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The evidence by which a step was judged."""

    stage: str
    """The stage of the step."""
    detectors: dict[str, Any]
    """The state of the detectors (`Detectors.state`) before the step."""
    policy: dict[str, Any]
    """The state of the policy (`Policy.state`) before the step."""
    values: Mapping[str, np.ndarray]
    """The vital statistics by name, float32, shaped like their grids."""

    def packed(self) -> bytes:
        """Return it as a NumPy `npz` file: one array per statistic, and `about`, the rest as JSON."""
        about = json.dumps({"stage": self.stage, "detectors": self.detectors, "policy": self.policy})
        file, arrays = io.BytesIO(), {"about": np.array(about), **self.values}
        np.savez_compressed(file, allow_pickle=False, **arrays)
        return file.getvalue()

    @staticmethod
    def read(path: Path) -> "Judged":
        """Return the inverse of `packed`. Raises `ValueError` if the file is missing or incomplete."""
        try:
            with np.load(path, allow_pickle=False) as file:
                values = {name: file[name] for name in file.files}
            return Judged(**json.loads(str(values.pop("about"))), values=values)
        except (OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path}: {error}") from error


class Ledger:
    """Writes decisions. If the disk is full, a warning is logged once and the run continues."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / FILE_NAME
        self._judged = run_dir / JUDGED
        self._failed = False

    def write(self, event: str, step: int, **evidence: Any) -> None:
        """Append one decision.

        Args:
            event: the kind of event, in snake_case.
            step: the last finished step at that time.
            evidence: anything that JSON can hold, and frozen recipe values and NumPy scalars.
        """
        assert "time" not in evidence, "the ledger puts the time in by itself"
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = jsonl.dump({"time": time, "event": event, "step": step, **evidence})
        size: int | None = None
        try:
            size = self._path.stat().st_size if self._path.exists() else 0
            with jsonl.open_to_append(self._path) as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if size == 0:
                sync(self._path.parent)  # where its name is
        except OSError as error:
            if size is not None:
                with suppress(OSError):  # a full disk accepts the first part of a line
                    os.truncate(self._path, size)
            self._fail(self._path, error)

    def keep(self, step: int, judged: Judged) -> str | None:
        """Save the evidence by which a step was judged.

        Returns the path in the run folder, or None if the disk is full.
        """
        names = (f"step-{step:08d}{f'-{number}' if number > 1 else ''}.npz" for number in count(1))
        path = self._judged / next(name for name in names if not (self._judged / name).exists())
        try:
            make_folder(self._judged)
            with atomic_write(path, durable=True) as temporary:
                temporary.write_bytes(judged.packed())
        except OSError as error:
            self._fail(path, error)
            return None
        return f"{JUDGED}/{path.name}"

    def _fail(self, path: Path, error: OSError) -> None:
        if not self._failed:
            log.warning("%s cannot be written (%s); the run continues without it", path, error)
        self._failed = True


def read(run_dir: Path, *events: str) -> list[dict[str, Any]]:
    """Return the lines of a run, in the order in which they were written; with `events`, only those kinds.

    A line that a crash has cut short is left out.
    """
    return [line for line in jsonl.read(run_dir / FILE_NAME) if not events or line.get("event") in events]
