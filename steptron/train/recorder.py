"""The records of a run on each rank: statistics and metrics to the sinks, events to the ledger, alerts to people.

step   ─► host copy of the plane ─► collector (a thread) ─► sinks.py: metrics.jsonl, store or server, W&B
record ─► ledger.jsonl (rank 0) and the log of each rank
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from steptron.monitor.sinks.collector import Collector, MakeSink
from steptron.monitor.sinks.progress import ProgressLine
from steptron.monitor.statistics.frame import Alert, Scalar
from steptron.monitor.statistics.gather import Gather
from steptron.monitor.statistics.host_copy import HostCopies
from steptron.monitor.statistics.plane import Plane
from steptron.monitor.storage.ledger import Judged, Ledger

TIMES = ("step_time", "data_wait", "communication_time")
"""The statistics that are known after their step. The next step is judged by them."""

log = logging.getLogger("steptron")


class Recorder:
    """The recorder of one rank."""

    def __init__(
        self,
        folder: Path,
        plane: Plane,
        sinks: Mapping[str, MakeSink],
        gather: Gather | None,
        progress: ProgressLine | None,
        *,
        stores: bool,
        resumed: int | None,
    ):
        """Open the sinks.

        Args:
            folder: the run folder.
            plane: the statistics of this rank.
            sinks: the destinations of this rank, by name.
            gather: combines the planes of all ranks for W&B; None: nobody needs that.
            progress: the line on the terminal; None: none on this rank.
            stores: whether a sink of this rank takes the plane.
            resumed: the step of the checkpoint that the run continues from; None: a new run.
        """
        self.last_step = resumed or 0
        """The last step of the run that counts."""
        self._plane, self._gather, self._progress = plane, gather, progress
        self._rank = dist.get_rank()
        # Rank 0 stores the vital statistics, which are the same on all ranks.
        self._first_slot = plane.registry.vital_slots if self._rank else 0
        slots = plane.registry.slots - self._first_slot
        self._copies = HostCopies(slots, plane.values.device) if stores else None
        self._collector = Collector(sinks, resumed)
        self._ledger = None if self._rank else Ledger(folder)

    @property
    def slots(self) -> int:
        """Return the number of values per step of this rank."""
        return self._plane.registry.slots

    def record(self, event: str, step: int, **evidence: object) -> None:
        """Write an event to the ledger (rank 0) and to the log (every rank)."""
        if self._ledger is not None:
            self._ledger.write(event, step, **evidence)
        log.info("%s at step %d %s", event, step, evidence)

    def say(self, text: str) -> None:
        """Show a line, on rank 0."""
        if self._progress is not None:
            self._progress.say(text)

    def keep_evidence(self, step: int, judged: Judged) -> str | None:
        """Write what a step was judged by. Return the file's path in the run folder, or None on other ranks than 0."""
        return None if self._ledger is None else self._ledger.keep(step, judged)

    def alert(self, alert: Alert) -> None:
        """Tell people, through the sinks that can."""
        self._collector.alert(alert)

    def step(
        self,
        metrics: Mapping[str, Scalar],
        by_source: Mapping[str, int],
        vital: Tensor,
        data_wait: float,
        waited: float,
    ) -> None:
        """Record a step, and make the plane ready for the next one.

        Args:
            metrics: scalars of all ranks by name, `step` and `step_time` among them.
            by_source: tokens of the step by data source.
            vital: the vital statistics, summed over all ranks.
            data_wait: the seconds that this rank waited for data.
            waited: the seconds that this rank waited in collectives.
        """
        self.last_step = int(metrics["step"] or 0)
        mine = of_all = None
        if self._copies is not None:
            self._plane.vital.copy_(vital)
            mine = of_all = self._copies.send(self._plane.values[self._first_slot :])
        if self._gather is not None:
            of_all = self._gather.send(self._plane.values)
        self._plane.reset()
        # The detectors judge a step by the times of the step before: its own are not known yet.
        for name, seconds in zip(TIMES, (metrics["step_time"] or 0.0, data_wait, waited), strict=True):
            self._plane.view(name)[self._rank].fill_(float(seconds))
        self._collector.step(metrics, by_source, mine, of_all)
        if self._progress is not None:
            self._progress.update(metrics)

    def go_back(self, step: int) -> None:
        """Drop the steps after `step`, because the run was rewound to it."""
        self._plane.reset()
        self.last_step = step
        self._collector.truncate_after(step)

    def flush(self) -> None:
        """Write everything to disk, before a checkpoint."""
        self._collector.flush()

    def close(self) -> None:
        """End the progress line and close the sinks, also if the run ends early."""
        if self._progress is not None:
            self._progress.close()
        self._collector.close()
        if self._copies is not None and self._copies.dropped:
            log.warning(
                "%d steps' statistics were dropped: writing them took longer than the steps", self._copies.dropped
            )
