"""The status of a rank, its step and phase, which outlives it: the launcher reads it, and so do the other ranks.

    RankStatus.enter(step, phase) ──► the store that all ranks share, and a file for the launcher, in case the rank dies

This module does not import what handles tensors, so that a launcher starts in half the time.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

FOLDER_VARIABLE = "STEPTRON_RANK_STATUS"
"""Environment variable with the folder in which the launcher reads the status of its ranks, one file per rank."""

PR_SET_PDEATHSIG = 1
"""prctl's number for the signal that this process receives when its parent dies."""


class RankStatus:
    """The step and phase of this rank, which others can read after it is gone.

    `enter` takes some ten microseconds.
    """

    def __init__(self, publish: Callable[[str], None] | None, rank: int):
        """`publish` writes a status to the store of all ranks; it may raise `RuntimeError`. None: there is no store."""
        self.step, self.text = 0, ""
        self._publish = publish
        folder = os.environ.get(FOLDER_VARIABLE)
        self._file = os.open(Path(folder) / str(rank), os.O_WRONLY | os.O_CREAT) if folder else None
        if folder and sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def enter(self, step: int, phase: str) -> None:
        """Record that this rank is now in `phase` of `step`."""
        self.step, self.text = step, f"step {step}, {phase}"
        if self._file is not None:
            os.pwrite(self._file, f"{self.text}\n".encode(), 0)
        if self._publish is not None:
            with suppress(RuntimeError):  # a step must not fail because its status cannot be written
                self._publish(self.text)

    def close(self) -> None:
        """Close the file for the launcher."""
        if self._file is not None:
            os.close(self._file)


def read_status(folder: Path, rank: int) -> str:
    """Return the last status of rank `rank` of this machine, or "" if it wrote none. Called by the launcher."""
    path = folder / str(rank)
    return path.read_text().partition("\n")[0] if path.exists() else ""
