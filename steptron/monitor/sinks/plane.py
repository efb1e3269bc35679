"""The metrics plane as Parquet files, written by the rank itself; see `store` for the files.

On resume, the rank also drops later steps from other parts. Of W writing ranks, rank r is responsible for the parts r,
r + W, r + 2W, …, whose ranks may no longer exist; rank 0 also for those that servers wrote.
"""

from pathlib import Path

from steptron.monitor.statistics.frame import Alert, Frame
from steptron.monitor.statistics.registry import Registry
from steptron.monitor.storage.store import Store


class PlaneSink:
    """A sink for one rank's part of the plane. Like every sink, it may raise OSError."""

    def __init__(self, folder: str | Path, registry: Registry, flush_every: int, rank: int = 0, writers: int = 1):
        """Open the part of `rank`, one of `writers` writing ranks. `folder` is a path or a URL that fsspec accepts."""
        self._rank, self._writers = rank, writers
        self._store = Store(folder, part_name(rank), registry, flush_every)
        self._foreign = not self._store.empty
        """True if this part has files but the run was not resumed: rows of two runs would be added up."""

    def write(self, frame: Frame) -> None:
        """Keep the step; the plane must not be changed afterwards."""
        if self._foreign:
            path = self._store.folder.path
            raise OSError(
                f"{path} has another run's metrics, and this one is new: give it a folder of its own (monitor.store)"
            )
        if frame.plane is not None:
            self._store.add(frame.step, frame.plane, (self._rank,))

    def alert(self, alert: Alert) -> None:
        """Do nothing: alerts go to other sinks."""

    def flush(self) -> None:
        """Write the steps that are in memory."""
        self._store.flush()

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps."""
        self._foreign = False
        self._store.truncate_after(step, self._answers_for)

    def close(self) -> None:
        """Write the remaining steps and close the files."""
        self._store.close()

    def _answers_for(self, part: str) -> bool:
        kind, _, number = part.rpartition("-")
        if kind == "rank" and number.isdigit():
            return int(number) % self._writers == self._rank
        return self._rank == 0


def part_name(rank: int) -> str:
    """Return the name of the part that a rank writes."""
    return f"rank-{rank:05d}"
