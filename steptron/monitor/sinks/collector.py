"""Takes a step's numbers from training and hands them to the sinks, in a thread of its own.

    training ── step, alert, flush ──► queue ──► writer thread ── Frame ──► sinks: metrics.jsonl, the plane's store or server, W&B

Training puts and goes on; only `flush`, before a checkpoint, waits until all is on disk. A sink that cannot write (a
full disk) is warned of once and left out; metrics.jsonl alone keeps what it could not write, and does not tell of it
here (`sinks.jsonl`). One that meets any other error, a bug of ours, loses that frame and goes on with the next, unless
it was to forget steps: these would be there twice. The other sinks, and the run, go on in all cases.
"""

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType

from steptron.monitor.statistics.frame import Alert, Frame, Scalar, Sink
from steptron.monitor.statistics.host_copy import PendingCopy

log = logging.getLogger("steptron")

PATIENCE_S = 120.0
"""The seconds that training waits for sinks, at a checkpoint and at its end."""

MakeSink = Callable[[], Sink]


class Collector:
    """The collector of one rank. It is a context manager that closes itself."""

    def __init__(self, sinks: Mapping[str, MakeSink], resumed: int | None = None):
        """Open the sinks.

        Args:
            sinks: what is opened, by the name that a warning gives it.
            resumed: the step of the checkpoint that the run goes on from; what was written of later steps is dropped. None: a new run.
        """
        self._sinks: dict[str, Sink] = {}
        self._bugs: Counter[str] = Counter()
        for name, make in sinks.items():
            self._open(name, make)
        if resumed is not None:
            self._forget(resumed)
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._thread.start()

    def step(
        self,
        metrics: Mapping[str, Scalar],
        tokens_by_source: Mapping[str, int],
        plane: PendingCopy | None,
        whole: PendingCopy | None = None,
    ) -> None:
        """Record one step.

        Args:
            metrics: scalars by name, `step` and `stage` among them; NumPy scalars are taken as they are.
            tokens_by_source: tokens of this step's batch (not of the run so far) by data source.
            plane: values of the statistics of this rank. None: none are stored, or there was no room for them.
            whole: those of all ranks put together; `plane` itself where this rank has them all. None: nobody asks for them, or no room.
        """
        step = metrics["step"]
        assert isinstance(step, int), f"metrics must have an integer step, not {step!r}"

        def write() -> None:
            values = None if plane is None else plane.unpack()
            of_all = values if whole is plane else None if whole is None else whole.unpack()
            frame = Frame(step=step, metrics=metrics, tokens_by_source=tokens_by_source, plane=values, whole=of_all)
            self._each(lambda sink: sink.write(frame))

        self._tasks.put(write)

    def alert(self, alert: Alert) -> None:
        """Tell people."""
        self._tasks.put(lambda: self._each(lambda sink: sink.alert(alert)))

    def truncate_after(self, step: int) -> None:
        """Forget the steps after `step`, which is where a rewound run goes on from."""
        self._tasks.put(lambda: self._forget(step))

    def flush(self) -> None:
        """Put everything on disk; to be called with every checkpoint, so that a resumed run finds its past whole."""
        done = threading.Event()

        def flush() -> None:
            self._each(lambda sink: sink.flush())
            done.set()

        self._tasks.put(flush)
        if not done.wait(PATIENCE_S):
            log.warning("metrics are not on disk after %d s; training continues", PATIENCE_S)

    def close(self) -> None:
        """Write what is left and close every sink. Idempotent."""
        if self._thread is None:
            return
        self._tasks.put(lambda: self._each(lambda sink: sink.close()))
        self._tasks.put(None)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            log.warning("metrics are not on disk after %d s; the run ends without them", PATIENCE_S)
        self._thread = None
        self._sinks = {}
        for name, times in self._bugs.items():
            if times > 1:
                log.warning("%s has lost %d frames to errors", name, times)

    def __enter__(self) -> "Collector":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:
                log.warning("a step's metrics are lost", exc_info=True)

    def _open(self, name: str, make: MakeSink) -> None:
        try:
            self._sinks[name] = make()
        except OSError as error:
            log.warning("%s cannot be written: %s; training continues without it", name, error)

    def _forget(self, step: int) -> None:
        self._each(lambda sink: sink.truncate_after(step), must=True)

    def _each(self, act: Callable[[Sink], None], must: bool = False) -> None:
        """Neither training nor the other sinks may end for one that fails. `must`: a sink that has not done it is of no
        more use."""
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
