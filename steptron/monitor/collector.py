"""Takes a step's numbers from training and hands them to the sinks, in a thread of its own.

    training ── step, alert, flush ──► queue ──► writer thread ── Frame ──► sinks: metrics.jsonl, the plane's store or server, W&B

Training puts and goes on; only `flush`, before a checkpoint, waits until all is on disk. A sink that cannot write (a full disk) is
warned of once and left out; the others, and the run, go on.
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from types import TracebackType

from steptron.monitor.frame import Alert, Frame, Scalar, Sink
from steptron.monitor.outbox import Parcel

log = logging.getLogger("steptron")

PATIENCE_S = 120.0
"""How long training waits for sinks, at a checkpoint and at its end."""

MakeSink = Callable[[], Sink]


class Collector:
    """One a rank; a context manager that closes itself."""

    def __init__(self, sinks: Mapping[str, MakeSink], resumed: int | None = None):
        """Open the sinks.

        Args:
            sinks: what is opened, by the name that a warning gives it.
            resumed: the step of the checkpoint that the run goes on from; what was written of later steps is dropped. None: a new run.
        """
        self._sinks: dict[str, Sink] = {}
        for name, make in sinks.items():
            self._open(name, make)
        if resumed is not None:
            self._each(lambda sink: sink.truncate_after(resumed))
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._thread.start()

    def step(self, metrics: Mapping[str, Scalar], tokens_by_source: Mapping[str, int], plane: Parcel | None) -> None:
        """Record one step.

        Args:
            metrics: scalars by name, `step` and `stage` among them; NumPy scalars are taken as they are.
            tokens_by_source: tokens of this step's batch (not of the run so far) by data source.
            plane: values of the statistics of this rank. None: none are stored, or there was no room for them.
        """
        step = metrics["step"]
        assert isinstance(step, int), f"metrics must have an integer step, not {step!r}"

        def write() -> None:
            values = None if plane is None else plane.unpack()
            frame = Frame(step=step, metrics=metrics, tokens_by_source=tokens_by_source, plane=values)
            self._each(lambda sink: sink.write(frame))

        self._tasks.put(write)

    def alert(self, alert: Alert) -> None:
        """Tell people."""
        self._tasks.put(lambda: self._each(lambda sink: sink.alert(alert)))

    def truncate_after(self, step: int) -> None:
        """Forget the steps after `step`, which is where a rewound run goes on from."""
        self._tasks.put(lambda: self._each(lambda sink: sink.truncate_after(step)))

    def flush(self) -> None:
        """Put everything on disk; to be called with every checkpoint, so that a resumed run finds its past whole."""
        done = threading.Event()

        def flush() -> None:
            self._each(lambda sink: sink.flush())
            done.set()

        self._tasks.put(flush)
        if not done.wait(PATIENCE_S):
            log.warning("metrics are not on disk after %d s; training goes on", PATIENCE_S)

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
                log.exception("a step's metrics are lost")

    def _open(self, name: str, make: MakeSink) -> None:
        try:
            self._sinks[name] = make()
        except OSError as error:
            log.warning("%s cannot be written: %s; training goes on without it", name, error)

    def _each(self, act: Callable[[Sink], None]) -> None:
        """A sink that fails is left out from then on: neither training nor the other sinks may end for it."""
        for name, sink in list(self._sinks.items()):
            try:
                act(sink)
            except OSError as error:
                del self._sinks[name]
                log.warning("%s stopped: %s; training goes on without it", name, error)
            except Exception:
                del self._sinks[name]
                log.exception("%s stopped; training goes on without it", name)
