"""SIGTERM, SIGUSR1 and SIGINT: the run finishes its step, saves, and leaves with 75.

signal ─► Signals.counts of this rank ─ the step's first all-reduce ─► all ranks stop after the same step, whoever got it

Nothing heavy is imported here: the handlers stand before torch is.
"""

import os
import signal
from types import FrameType

NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")
"""SIGTERM: a scheduler or a person ends the job · SIGUSR1: Slurm's warning before the time limit · SIGINT: ^C."""

STDERR = 2


class Signals:
    """Inside the block each signal asks the run to stop. A second ^C ends the process at once."""

    def __init__(self):
        self._came: dict[str, int] = dict.fromkeys(NAMES, 0)

    def __enter__(self) -> "Signals":
        self._before = {name: signal.signal(getattr(signal, name), self._note) for name in NAMES}
        return self

    @property
    def came(self) -> list[int]:
        """For each of `NAMES`, 1 where it came, else 0."""
        return [min(count, 1) for count in self._came.values()]

    def __exit__(self, *_: object) -> None:
        """Signals do what they did before: nothing is left to be saved."""
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
            # Not print: the handler may interrupt one.
            os.write(STDERR, f"\n{name}: the run saves and ends after this step{once_more}\n".encode())
