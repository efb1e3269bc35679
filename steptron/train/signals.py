"""On SIGTERM, SIGUSR1 and SIGINT the run finishes its step, saves, and exits with code 75.

    signal ─► Signals.came of this rank ─ the step's first all-reduce ─► all ranks stop after the same step

Nothing here imports torch, so that the handlers are installed before that import.
"""

import os
import signal
from types import FrameType
from typing import Any

NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")
"""The signals, in the order of `Signals.came`.

SIGTERM: a scheduler or a person ends the job. SIGUSR1: Slurm's warning before the time limit. SIGINT: ^C.
"""

STDERR = 2


class Signals:
    """A context manager in which each signal asks the run to stop. A second ^C ends the process at once."""

    def __init__(self):
        self._came: dict[str, int] = dict.fromkeys(NAMES, 0)
        self._before: dict[str, Any] = {}

    def __enter__(self) -> "Signals":
        self._before = {name: signal.signal(getattr(signal, name), self._note) for name in NAMES}
        return self

    @property
    def came(self) -> list[int]:
        """Return 1 for each of `NAMES` that came, and 0 for the others."""
        return [min(count, 1) for count in self._came.values()]

    def __exit__(self, *_: object) -> None:
        """Restore the handlers that were there before. Nothing is left to be saved."""
        for name, handler in self._before.items():
            signal.signal(getattr(signal, name), handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self._came[name] += 1
        if name == "SIGINT" and self._came[name] > 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        elif self._came[name] == 1 and os.environ.get("RANK", "0") == "0":
            once_more = "; once more to end at once" if name == "SIGINT" else ""
            # print is not reentrant, and the signal may have interrupted one.
            os.write(STDERR, f"\n{name}: the run saves and ends after this step{once_more}\n".encode())
