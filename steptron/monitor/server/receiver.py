"""A receiver process: an Arrow Flight server that checks frames, passes them to the reducer, and answers SQL.

DoPut thread, one per rank:  hello ─► reducer agrees ─► frame ─► free slot of shared memory ─► reducer
listener thread:             messages of the reducer: free slots, frames that are on disk
acker thread:                confirms frames to the ranks
"""

import hmac
import itertools
import json
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from steptron.monitor.server.protocol import (
    RECEIVERS,
    SCHEMA,
    Hello,
    RefusedError,
    check_run,
    decode_hello,
    decode_number,
    decode_registry,
    encode_number,
)
from steptron.monitor.server.shared import Slots
from steptron.monitor.storage.files import FOLDER_NAME

_ANSWER_S = 60.0
"""The seconds that the reducer may take to agree to a stream, or to write its last frames."""
_LEAVE_S = 2.0
"""The seconds that ranks may take to end their streams when the server stops."""
_SQL_S = 120.0
"""The seconds that a query may take."""


@dataclass(kw_only=True)
class _Stream:
    """The state that the threads of one stream share."""

    writer: Any
    """The writer towards the rank."""
    free: "queue.SimpleQueue[int | None]" = field(default_factory=queue.SimpleQueue)
    """The free slots; None if the reducer accepts no more frames of this stream."""
    answer: "queue.SimpleQueue[str | None]" = field(default_factory=queue.SimpleQueue)
    """The reducer's answer to the hello: None, or the reason for a refusal."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    changed: threading.Condition = field(default_factory=threading.Condition)
    done: int = 0
    """The number of frames that are on disk."""
    reason: str | None = None
    """The reason why the reducer accepts no more frames."""
    closed: bool = False


class CheckToken(flight.ServerMiddlewareFactory):
    """Refuses calls without the token."""

    def __init__(self, token: str | None, link: "Link"):
        super().__init__()
        self._expected, self._link = token and f"Bearer {token}", link

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> None:
        """Raise an error if the call must be refused."""
        if self._expected is None:
            return
        given = next((values[0] for name, values in headers.items() if name.lower() == "authorization" and values), "")
        if isinstance(given, bytes):
            given = given.decode(errors="replace")
        if not hmac.compare_digest(given.encode(), self._expected.encode()):
            kind = "wrong token" if given else "no token"
            self._link.send("refused", kind, str(info.method))
            raise flight.FlightUnauthenticatedError(f"{kind}: see monitor.server.token_file")


class Link:
    """The connection to the reducer, for several threads."""

    def __init__(self, connection: Connection, reducer_pid: int):
        self.connection, self._pid = connection, reducer_pid
        self._lock = threading.Lock()

    def send(self, kind: str, *content: Any) -> None:
        """Send a message."""
        with self._lock:
            self.connection.send((kind, *content))

    def send_slots(self, number: int, hello: Hello, slots: Slots) -> None:
        """Open a stream: send the hello, and the memory for its frames."""
        with self._lock:
            self.connection.send(("open", number, hello, slots.values, slots.count))
            slots.send(self.connection, self._pid)


class Receiver(flight.FlightServerBase):
    """The Flight server. `ports` are those of all receivers; None for receivers that are not asked for them."""

    def __init__(self, location: str, link: Link, store: str, token: str | None, tls: Any, ports: list[int]):
        super().__init__(location, tls_certificates=tls, middleware={"token": CheckToken(token, link)})
        self._link, self._store, self._ports = link, store.rstrip("/"), ports
        self._streams: dict[int, _Stream] = {}
        self._numbers = itertools.count()
        self._acks: queue.SimpleQueue[tuple[_Stream, int]] = queue.SimpleQueue()
        for target in (self._listen, self._acknowledge):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    # ── calls ──

    def do_action(self, context: Any, action: flight.Action) -> list[bytes]:
        """Return the ports of all receivers."""
        if action.type != RECEIVERS:
            self._link.send("refused", "action", action.type[:40])
            raise flight.FlightServerError(f"there is no action {action.type[:40]!r}")
        return [json.dumps(self._ports or [self.port]).encode()]

    def do_get(self, context: Any, ticket: flight.Ticket) -> flight.GeneratorStream:
        """Return the rows of a query."""
        import duckdb  # a large import, and few servers are queried

        from steptron.monitor.server.sql import select

        try:
            try:
                asked = json.loads(ticket.ticket)
                run, sql = str(asked["run"]), str(asked["sql"])
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise RefusedError("not a query", str(error)[:200]) from error
            check_run(run)
            opened = select(f"{self._store}/{run}/{FOLDER_NAME}", sql, _SQL_S)
            reader = opened.__enter__()
        except RefusedError as error:
            self._link.send("refused", error.kind, error.detail.splitlines()[0])
            raise flight.FlightServerError(error.detail) from error

        def rows() -> Iterator[pa.RecordBatch]:
            try:
                yield from reader
            except duckdb.Error as error:
                raise flight.FlightServerError(str(error)) from error
            finally:
                opened.__exit__(None, None, None)

        return flight.GeneratorStream(reader.schema, rows())

    def do_put(self, context: Any, descriptor: flight.FlightDescriptor, reader: Any, writer: Any) -> None:
        """Receive a rank's frames until it ends the stream and all of them are on disk."""
        try:
            hello = decode_hello(descriptor.command or b"")
            schema = _schema_of(reader)
            if schema != SCHEMA:
                raise RefusedError("columns", f"{schema} is not {SCHEMA}".replace("\n", ", ")[:200])
            values = decode_registry(hello.registry).slots
        except (RefusedError, TypeError) as error:
            raise self._refuse(error) from error
        number, stream = next(self._numbers), _Stream(writer=writer)
        self._streams[number] = stream
        slots = Slots.fitting(values)
        for slot in range(slots.count):
            stream.free.put(slot)
        try:
            self._link.send_slots(number, hello, slots)
            self._await_answer(stream)
            sent = self._take(number, stream, slots, reader)
            self._link.send("end", number)
            with stream.changed:
                stream.changed.wait_for(lambda: stream.done >= sent or stream.reason is not None, _ANSWER_S)
            if stream.reason is not None:
                raise flight.FlightUnavailableError(stream.reason)
        except RefusedError as error:
            raise self._refuse(error) from error
        finally:
            with stream.lock:
                stream.closed = True
            del self._streams[number]
            self._link.send("gone", number)

    def _take(self, number: int, stream: _Stream, slots: Slots, reader: Any) -> int:
        """Pass frames to the reducer; return how many came."""
        count = 0
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                return count
            except pa.ArrowInvalid as error:
                raise RefusedError("not a frame", str(error).splitlines()[0][:200]) from error
            step = decode_number(None if chunk.app_metadata is None else chunk.app_metadata.to_pybytes())
            rows = 0 if chunk.data is None else chunk.data.num_rows
            if rows not in (0, slots.values):
                raise RefusedError("slots", f"a frame of {rows} values, its registry has {slots.values}")
            slot = stream.free.get()
            if slot is None:
                raise flight.FlightUnavailableError(stream.reason or "")
            if chunk.data is not None and rows:
                column = chunk.data.column(0)
                if column.null_count:
                    raise RefusedError("nulls", "a frame has values that are null")
                slots.view(slot)[:] = column.to_numpy()
            self._link.send("frame", number, count, step, slot, rows > 0)
            count += 1

    def _await_answer(self, stream: _Stream) -> None:
        try:
            reason = stream.answer.get(timeout=_ANSWER_S)
        except queue.Empty:
            reason = "the reducer does not answer"
        if reason is not None:
            raise flight.FlightServerError(reason)

    def _refuse(self, error: Exception) -> flight.FlightServerError:
        kind, detail = (error.kind, error.detail) if isinstance(error, RefusedError) else ("not a hello", str(error))
        self._link.send("refused", kind, detail)
        return flight.FlightServerError(f"{kind}: {detail}")

    # ── the reducer's word ──

    def _listen(self) -> None:
        try:
            while True:
                kind, number, *content = self._link.connection.recv()
                stream = self._streams.get(number)
                if stream is not None:
                    self._hear(stream, kind, *content)
        except (EOFError, OSError):  # the reducer has ended
            for stream in list(self._streams.values()):
                self._hear(stream, "reset", "the server is stopping")
            deadline = time.monotonic() + _LEAVE_S
            while self._streams and time.monotonic() < deadline:
                time.sleep(0.01)
            os._exit(0)  # `shutdown` would wait for calls that hang, and nothing here needs to be saved

    def _hear(self, stream: _Stream, kind: str, content: Any) -> None:
        match kind:
            case "free":
                stream.free.put(content)
            case "opened":
                stream.answer.put(content)
            case "ack":
                self._acks.put((stream, content))
            case "reset":
                with stream.changed:
                    stream.reason = content
                    stream.changed.notify_all()
                stream.free.put(None)
                self._acks.put((stream, -1))  # the rank may have nothing to send, and would not notice otherwise

    def _acknowledge(self) -> None:
        while True:
            stream, done = self._acks.get()
            with stream.lock:
                if not stream.closed:
                    try:
                        stream.writer.write(pa.py_buffer(encode_number(done)))
                    except (pa.ArrowException, OSError):
                        stream.closed = True
            with stream.changed:
                stream.done = max(stream.done, done)
                stream.changed.notify_all()


def _schema_of(reader: Any) -> pa.Schema:
    """Return the schema of a stream's first message. Raises `RefusedError` if the stream begins with anything else."""
    try:
        return reader.schema
    except pa.ArrowInvalid as error:
        raise RefusedError("not a frame", str(error).splitlines()[0][:200]) from error


def run_receiver(
    location: str,
    connection: Connection,
    reducer_pid: int,
    store: str,
    token: str | None,
    tls: Any,
    ports: list[int],
    ready: Connection,
) -> None:
    """Run the process: send its port to `ready`, and serve until the reducer is gone."""
    server = Receiver(location, Link(connection, reducer_pid), store, token, tls, ports)
    ready.send(server.port)
    server.serve()
