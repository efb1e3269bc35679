"""The rank's side of a metrics server: it sends one frame per step, and keeps it until the server has it on disk.

    write ─► backlog ── sender thread ──► server
                     ◄── the first n frames are on disk ──┘

`write` never waits. While no server answers, frames stay in the backlog, and beyond a few on local disk. They are sent
when a server answers again, by this run or by one that is resumed from it. Rank r sends to addresses[r % number of
addresses].
"""

import json
import logging
import random
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from steptron.config.monitoring import ServerConfig
from steptron.monitor.server import protocol
from steptron.monitor.sinks.backlog import Backlog, UnconfirmedFrame
from steptron.monitor.statistics.frame import Alert, Frame
from steptron.monitor.statistics.registry import Registry
from steptron.monitor.storage.files import FOLDER_NAME

CLOSE_S = 10.0
"""The seconds that `close` waits for the server to confirm the last frames."""
_PAUSES_S = (0.2, 10.0)
"""The pause in seconds between two attempts to reach the server: at first, and at most."""
_CALL_S = 10.0
_CHANNEL = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]

log = logging.getLogger("steptron")


@dataclass(kw_only=True, eq=False)
class _Stream:
    """A connection that sends the frames of one rank, registry and attempt."""

    writer: Any
    sent: deque[int] = field(default_factory=deque)
    """The numbers of the frames that are not confirmed."""
    confirmed: int = 0
    finished: bool = False
    """True if nothing more will be sent."""
    ended: bool = False
    """True if the server has ended the stream."""

    @property
    def broken(self) -> bool:
        """Return whether the stream ended too early."""
        return self.ended and (bool(self.sent) or not self.finished)


class ServerSink:
    """Sends one rank's planes to its metrics server. Problems of the server cause warnings, never exceptions."""

    def __init__(
        self,
        run_dir: Path,
        config: ServerConfig,
        run: str,
        registry: Registry,
        *,
        uid: str,
        attempt: int,
        rank: int = 0,
        writers: int = 1,
        resumed: int | None = None,
    ):
        """Start the threads; nothing waits for the server.

        Raises `SteptronError` if the token or the certificate cannot be read.

        Args:
            run_dir: the run folder.
            config: addresses, token, certificate, room on disk.
            run: the name of the run.
            registry: the registry of this rank's planes.
            uid: the identity of the run, the same on all its ranks and in all its starts.
            attempt: a number that is the same on all ranks, and higher at each start of the run by more than its number
            of rewinds.
            rank: this rank.
            writers: the number of ranks of the run that have a `ServerSink`: 0 to writers − 1.
            resumed: the step from which the run continues; None for a new run.
        """
        self._run, self._rank, self._writers = run, rank, writers
        self._addresses = config.addresses
        self._address = config.addresses[rank % len(config.addresses)]
        self._headers = protocol.call_headers(protocol.read_token(config.token_file) if config.token_file else None)
        self._certificate = protocol.read_file(config.certificate, "certificate") if config.certificate else None
        self._attempt, self._resumed = attempt, resumed or 0
        self._fresh = True  # nothing has been written since the attempt began
        self._uid = uid
        spool = run_dir / FOLDER_NAME / "spool"
        self._backlog = Backlog(spool, rank, writers, registry.to_dict(), registry.identity, config.buffer_mb)
        self._backlog.adopt(resumed)
        self._closing = self._stopped = self._away = False
        self._failures = 0
        self._thread = threading.Thread(target=self._send, name="metrics server", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Return the number of frames that were dropped for lack of room."""
        return self._backlog.dropped

    # ── Sink ──

    def write(self, frame: Frame) -> None:
        """Take one step; the plane must not be changed afterwards. A step without a plane is announced as well."""
        self._fresh = False
        self._backlog.add(frame.step, np.zeros(0, np.float32) if frame.plane is None else frame.plane)

    def alert(self, alert: Alert) -> None:
        """Do nothing: alerts go to other sinks."""

    def flush(self) -> None:
        """Put unconfirmed frames on local disk: a run that is resumed from this checkpoint sends them."""
        self._backlog.to_disk()

    def truncate_after(self, step: int) -> None:
        """Begin another attempt, which continues from `step`; the server drops the values of later steps."""
        if self._fresh and step == self._resumed:  # the attempt began at this step
            return
        with self._backlog.change:
            self._backlog.go_back(step)
            self._attempt, self._resumed, self._fresh = self._attempt + 1, step, True

    def close(self) -> None:
        """Wait a little for the server to confirm the last frames; unconfirmed frames stay on local disk."""
        with self._backlog.change:
            self._closing = True
            self._backlog.change.notify_all()
            enough = self._failures + 2  # a try that was in progress when the server came back, and one more
            self._backlog.change.wait_for(lambda: not len(self._backlog) or self._failures >= enough, CLOSE_S)
            self._stopped = True
            self._backlog.change.notify_all()
        self._thread.join(2.0)
        self._backlog.close()
        if len(self._backlog):
            where = self._backlog.folder(self._rank)
            log.warning("%d steps of metrics have not reached the server: they are in %s", len(self._backlog), where)
        if self.dropped:
            log.warning("%d steps of metrics were dropped: no server, and no room", self.dropped)

    # ── the sender thread ──

    def _send(self) -> None:
        """Run sessions with the server; the pauses between them grow while it does not answer."""
        pause = _PAUSES_S[0]
        while not self._stopped:
            try:
                self._session()
                pause = 0.0
            except (flight.FlightError, pa.ArrowException, OSError, ValueError) as error:
                if not self._away:
                    reason = str(error).strip().splitlines()[0]
                    log.warning("metrics server %s: %s; frames are kept, and sent later", self._address, reason)
                    pause = _PAUSES_S[0]
                with self._backlog.change:
                    self._away = True
                    self._failures += 1
                    self._backlog.change.notify_all()
            with self._backlog.change:
                before = self._attempt, self._closing
                self._backlog.change.wait_for(
                    lambda before=before: self._stopped or before != (self._attempt, self._closing),
                    pause * random.uniform(0.5, 1.0),
                )
            pause = min(max(2 * pause, _PAUSES_S[0]), _PAUSES_S[1])

    def _session(self) -> None:
        """Send existing and new frames until something fails (raises), the attempt changes, or the sink is closed."""
        change = self._backlog.change
        with change:
            change.wait_for(lambda: len(self._backlog) > 0 or self._stopped)
            if self._stopped:
                return
            attempt = self._attempt
        streams: dict[tuple[int, str, bool], _Stream] = {}
        last = 0
        with self._connect() as client:
            while True:
                with change:
                    while not self._has_work(streams, attempt, last):
                        change.wait()
                    broken = next((stream for stream in streams.values() if stream.broken), None)
                    if self._stopped or self._attempt != attempt:
                        break
                    following = self._backlog.following(last)
                if broken is not None:
                    broken.writer.close()  # raises the server's error
                    raise OSError("the server ended the stream")
                if following is None:
                    _finish(streams)  # closing
                    continue
                last, held = following
                key = (held.rank, held.identity, held.late)
                if key not in streams:
                    _finish(streams)
                    streams[key] = self._open(client, held, attempt)
                self._send_one(streams[key], last, held)
            with suppress(flight.FlightError, pa.ArrowException, OSError):
                _finish(streams)
            with change:  # the server ends them: a stream that another thread reads cannot be closed
                change.wait_for(lambda: all(stream.ended for stream in streams.values()), _CALL_S)

    def _has_work(self, streams: Mapping[Any, _Stream], attempt: int, last: int) -> bool:
        if self._stopped or self._attempt != attempt or any(stream.broken for stream in streams.values()):
            return True
        if self._backlog.following(last) is not None:
            return True
        return self._closing and not all(stream.finished for stream in streams.values())

    def _connect(self) -> Any:
        """Connect to this rank's receiver."""
        scheme = "grpc+tls" if self._certificate else "grpc"
        more = {"tls_root_certs": self._certificate} if self._certificate else {}
        with flight.FlightClient(f"{scheme}://{self._address}", generic_options=_CHANNEL, **more) as client:
            options = flight.FlightCallOptions(headers=self._headers, timeout=_CALL_S)
            results = list(client.do_action(flight.Action(protocol.RECEIVERS, b""), options))
            ports = [int(port) for port in json.loads(results[0].body.to_pybytes())]
        host = self._address.rpartition(":")[0]
        port = ports[self._rank // len(self._addresses) % len(ports)]
        return flight.FlightClient(f"{scheme}://{host}:{port}", generic_options=_CHANNEL, **more)

    def _open(self, client: Any, held: UnconfirmedFrame, attempt: int) -> _Stream:
        """Begin a stream for frames like `held`."""
        hello = protocol.Hello(
            run=self._run,
            uid=self._uid,
            rank=held.rank,
            ranks=self._writers,
            server=self._rank % len(self._addresses),
            servers=len(self._addresses),
            attempt=attempt,
            resumed=self._resumed,
            late=held.late,
            registry=dict(self._backlog.registries[held.identity]),
        )
        descriptor = flight.FlightDescriptor.for_command(hello.encode())
        options = flight.FlightCallOptions(headers=self._headers)
        writer, reader = client.do_put(descriptor, protocol.SCHEMA, options)
        stream = _Stream(writer=writer)
        threading.Thread(target=self._hear, args=(stream, reader), name="metrics confirmed", daemon=True).start()
        return stream

    def _send_one(self, stream: _Stream, number: int, held: UnconfirmedFrame) -> None:
        values = held.load()
        if values is None:  # deleted, or incomplete after a crash
            self._backlog.confirm(number)
            return
        with self._backlog.change:
            stream.sent.append(number)
        array = pa.Array.from_buffers(pa.float32(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])
        batch = pa.RecordBatch.from_arrays([array], schema=protocol.SCHEMA)
        stream.writer.write_with_metadata(batch, pa.py_buffer(protocol.encode_number(held.step)))

    def _hear(self, stream: _Stream, reader: Any) -> None:
        """Read the server's confirmations of one stream, in a thread of its own."""
        change = self._backlog.change
        # Whatever ends the stream, the sender notices that it has ended, and asks for the reason.
        with suppress(flight.FlightError, pa.ArrowException, OSError, protocol.RefusedError):
            while (answer := reader.read()) is not None:
                done = protocol.decode_number(answer.to_pybytes())
                with change:
                    if self._away:
                        log.info("metrics server %s takes frames again", self._address)
                    self._away = False
                    while stream.confirmed < done and stream.sent:
                        self._backlog.confirm(stream.sent.popleft())
                        stream.confirmed += 1
        with change:
            stream.ended = True
            change.notify_all()


def _finish(streams: Mapping[Any, _Stream]) -> None:
    """Tell the server that no more frames will come; it then writes those that it has."""
    for stream in streams.values():
        if not stream.finished:
            stream.finished = True
            stream.writer.done_writing()
