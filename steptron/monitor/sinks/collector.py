"""The collector passes the numbers of each step from training to the sinks, in a thread of its own.

    training ── step, alert, flush ──► queue ──► writer thread ── Frame ──► sinks: metrics.jsonl, plane or server, W&B

Training only puts values into the queue; `flush`, before a checkpoint, waits until everything is on disk. A sink that
cannot write (a full disk) is warned about once and left out. Only metrics.jsonl keeps the lines that it could not
write, and is not left out (`metrics_jsonl.py`). If a sink raises any other error, which is a bug, it loses that frame
and continues with the next; but if it failed to drop steps, it is left out, because those steps would appear twice. The
other sinks and the run continue in all cases.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType

from steptron.monitor.statistics.frame import Alert, Frame, Scalar, Sink
from steptron.monitor.statistics.host_copy import PendingCopy
from steptron.worker import Worker

log = logging.getLogger("steptron")

PATIENCE_S = 120.0
"""The seconds that training waits for sinks, at a checkpoint and at its end."""

MakeSink = Callable[[], Sink]


class Collector:
    """The collector of one rank. It is a context manager that closes itself."""

    def __init__(self, sinks: Mapping[str, MakeSink], resumed: int | None = None):
        """Open the sinks.

        Args:
            sinks: functions that open a sink, by the name used in warnings.
            resumed: the step of the checkpoint from which the run continues; rows of later steps are dropped. None for
            a new run.
        """
        self._sinks: dict[str, Sink] = {}
        self._bugs: Counter[str] = Counter()
        for name, make in sinks.items():
            self._open(name, make)
        if resumed is not None:
            self._forget(resumed)
        self._worker = Worker("metrics", _lost)

    def step(
        self,
        metrics: Mapping[str, Scalar],
        tokens_by_source: Mapping[str, int],
        plane: PendingCopy | None,
        whole: PendingCopy | None = None,
    ) -> None:
        """Record one step.

        Args:
            metrics: scalars by name, including `step` and `stage`; NumPy scalars are accepted.
            tokens_by_source: tokens of this step's batch (not of the run so far) by data source.
            plane: values of this rank's statistics. None if none are stored, or if there was no room for them.
            whole: combined values of all ranks; the same as `plane` if this rank has them all. None if no sink needs
            them, or if there was no room for them.
        """
        step = metrics["step"]
        assert isinstance(step, int), f"metrics must have an integer step, not {step!r}"

        def write() -> None:
            values = None if plane is None else plane.unpack()
            of_all = values if whole is plane else None if whole is None else whole.unpack()
            frame = Frame(step=step, metrics=metrics, tokens_by_source=tokens_by_source, plane=values, whole=of_all)
            self._each(lambda sink: sink.write(frame))

        self._worker.put(write)

    def alert(self, alert: Alert) -> None:
        """Send a message to people."""
        self._worker.put(lambda: self._each(lambda sink: sink.alert(alert)))

    def truncate_after(self, step: int) -> None:
        """Drop the steps after `step`, from which a rewound run continues."""
        self._worker.put(lambda: self._forget(step))

    def flush(self) -> None:
        """Put everything on disk. Call this with every checkpoint, so that a resumed run finds all its past steps."""
        done = threading.Event()

        def flush() -> None:
            self._each(lambda sink: sink.flush())
            done.set()

        self._worker.put(flush)
        if not done.wait(PATIENCE_S):
            log.warning("metrics are not on disk after %d s; training continues", PATIENCE_S)

    def close(self) -> None:
        """Write the remaining frames and close every sink. Further calls do nothing."""
        self._worker.put(lambda: self._each(lambda sink: sink.close()))
        if not self._worker.close(PATIENCE_S):
            log.warning("metrics are not on disk after %d s; the run ends without them", PATIENCE_S)
        self._sinks = {}
        for name, times in self._bugs.items():
            if times > 1:
                log.warning("%s has lost %d frames to errors", name, times)
        self._bugs.clear()

    def __enter__(self) -> "Collector":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, name: str, make: MakeSink) -> None:
        try:
            self._sinks[name] = make()
        except OSError as error:
            log.warning("%s cannot be written: %s; training continues without it", name, error)

    def _forget(self, step: int) -> None:
        self._each(lambda sink: sink.truncate_after(step), must=True)

    def _each(self, act: Callable[[Sink], None], must: bool = False) -> None:
        """Call `act` for every sink. A sink that fails ends neither training nor the other sinks.

        With `must`, a sink that fails is left out from then on.
        """
        for name, sink in list(self._sinks.items()):
            try:
                act(sink)
            except Exception as error:
                system = isinstance(error, OSError)
                if system or must:
                    del self._sinks[name]
                    log.warning("%s stopped: %s; training continues without it", name, error, exc_info=not system)
                    continue
                self._bugs[name] += 1
                if self._bugs[name] == 1:
                    log.warning("%s has lost a frame: %r; it continues with the next", name, error, exc_info=True)


def _lost(error: Exception) -> bool:
    log.warning("a step's metrics are lost", exc_info=error)
    return True
