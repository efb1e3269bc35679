"""Check the server's address, token and TLS; start its reducer and receivers; wait for a signal to stop.

    parent ─┬─ reducer ◄─ a connection ─► receiver 0 (the port that ranks are given)
            └─           ◄─ a connection ─► receiver 1, …  (the next ports)

On a signal, the reducer writes its steps and confirms them to the ranks; then the receivers end. If a process dies, the
server exits with code 1. Ranks keep unconfirmed frames, so a server that is started again loses nothing.
"""

import ipaddress
import multiprocessing
import signal
import socket
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from steptron.errors import SteptronError
from steptron.monitor.server.protocol import read_file, read_token
from steptron.monitor.storage.files import Folder
from steptron.monitor.storage.log_times import StampedFormatter

_START_S = 60.0
_STOP_S = 120.0


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The options of `steptron monitor serve`."""

    bind: str = "127.0.0.1:8890"
    """The host and port. Further receivers take the ports after it. Port 0 means any free ports."""
    store: str = "runs"
    """The folder of run folders, on any file system that fsspec knows. A run's plane is in STORE/RUN/metrics."""
    receivers: int = 2
    """The number of processes that receive frames."""
    token_file: str = ""
    """The file with the token that callers must know."""
    tls_cert: str = ""
    """The certificate (chain), PEM."""
    tls_key: str = ""
    """The private key of the certificate, PEM."""
    timeout_s: float = 60.0
    """The seconds that a step waits for its last frames."""
    flush_every: int = 50
    """The largest number of steps in a file."""
    flush_s: float = 30.0
    """The seconds until the steps in memory are written."""
    log: str = ""
    """Where refusals and missing ranks are written. Empty: STORE/server.jsonl, or ./server.jsonl where STORE is
    remote."""


def serve(options: ServerOptions) -> int:
    """Serve until a signal comes, and return the exit code.

    Raises `SteptronError` if the server cannot be started with these options.
    """
    host, port = split_address(options.bind)
    token = read_token(options.token_file) if options.token_file else None
    tls = _certificates(options)
    if not (token and tls) and not _is_loopback(host):
        have = "only --token-file" if token else "only --tls-cert and --tls-key" if tls else "neither"
        raise SteptronError(
            f"--bind {options.bind} can be reached from outside and therefore needs --token-file "
            f"and --tls-cert with --tls-key, and there is {have}: give both, or bind to 127.0.0.1"
        )
    if port:
        _check_free(host, range(port, port + options.receivers))
    place = Folder.at(options.store)
    log = Path(options.log or (f"{place.path}/server.jsonl" if place.local else "server.jsonl"))
    processes = _Processes(options, host, port, token, tls, log)
    stopping: list[int] = []
    r, w = multiprocessing.Pipe(duplex=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopping or (stopping.append(number), w.send(number)))
    try:
        ports = processes.start()
        scheme = "grpc+tls" if tls else "grpc"
        shown = f"[{host}]" if ":" in host else host
        print(
            f"serving on {scheme}://{shown}:{ports[0]}, receivers {', '.join(map(str, ports))}, store {options.store}",
            flush=True,
        )
        ready = wait([r, *processes.sentinels])
        if r not in ready:
            print("error: a process of the server died; see its last lines", file=sys.stderr)
            return 1
        return 0
    finally:
        processes.stop()


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port` or `[v6]:port`. Raises `SteptronError`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise SteptronError(f"{address!r} is not an address; give HOST:PORT, such as 127.0.0.1:8890")
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    """Return whether all addresses of `host` are this machine's loopback."""
    try:
        found = {row[4][0] for row in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise SteptronError(f"--bind: {host} is not an address of this machine: {error.strerror}") from error
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def _check_free(host: str, ports: range) -> None:
    for port in ports:
        try:
            with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
                pass
        except OSError as error:
            raise SteptronError(f"--bind: port {port} of {host} cannot be used: {error.strerror}") from error


def _certificates(options: ServerOptions) -> Any:
    if bool(options.tls_cert) != bool(options.tls_key):
        raise SteptronError("--tls-cert and --tls-key go together: give both")
    if not options.tls_cert:
        return None
    return [(read_file(options.tls_cert, "certificate"), read_file(options.tls_key, "key"))]


class _Processes:
    """The server's child processes. They are spawned, not forked, because gRPC has threads."""

    def __init__(self, options: ServerOptions, host: str, port: int, token: str | None, tls: Any, log: Path):
        self._options, self._host, self._port = options, host, port
        self._token, self._tls, self._log = token, tls, log
        self._spawn = multiprocessing.get_context("spawn")
        self._reducer: Any = None
        self._control: Connection | None = None
        self._receivers: list[Any] = []

    @property
    def sentinels(self) -> list[int]:
        """Return objects of which one becomes readable when a process has ended."""
        return [process.sentinel for process in (self._reducer, *self._receivers)]

    def start(self) -> list[int]:
        """Start all processes and return the receivers' ports."""
        options, count = self._options, self._options.receivers
        pipes = [self._spawn.Pipe() for _ in range(count)]
        theirs, self._control = self._spawn.Pipe()
        settings = (
            options.store,
            self._log,
            f"{self._host}:{self._port}",
            options.timeout_s,
            options.flush_every,
            options.flush_s,
        )
        self._reducer = self._spawn.Process(
            target=_reducer_main, args=(settings, [ours for ours, _ in pipes], theirs), name="reducer"
        )
        self._reducer.start()
        theirs.close()
        ports: list[int] = []
        for position in reversed(range(count)):  # the first receiver knows the ports of the others
            r, w = self._spawn.Pipe(duplex=False)
            location = self._location(position)
            arguments = (location, pipes[position][1], self._reducer.pid, options.store, self._token, self._tls)
            process = self._spawn.Process(
                target=_receiver_main, args=(*arguments, list(ports), w), name=f"receiver {position}"
            )
            process.start()
            self._receivers.append(process)
            w.close()
            if not r.poll(_START_S):
                raise SteptronError(f"--bind: a receiver could not be started at {location}")
            try:
                ports.insert(0, r.recv())
            except EOFError:
                raise SteptronError(f"--bind: a receiver could not be started at {location}: see above") from None
        for ours, other in pipes:
            ours.close()
            other.close()
        return ports

    def stop(self) -> None:
        """Let the reducer write its steps; then end all processes."""
        if self._reducer is not None:
            if self._control is not None:
                self._control.close()
            self._reducer.join(_STOP_S)
        for process in self._receivers:
            process.join(5.0)
        for process in (*self._receivers, self._reducer):
            if process is not None and process.is_alive():
                process.kill()
                process.join()

    def _location(self, position: int) -> str:
        scheme = "grpc+tls" if self._tls else "grpc"
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{scheme}://{host}:{self._port + position if self._port else 0}"


def _set_up_child() -> None:
    """Ignore signals, which the parent handles, and log to standard error."""
    import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(StampedFormatter("%(asctime)s %(message)s"))


def _reducer_main(settings: tuple[Any, ...], links: list[Connection], control: Connection) -> None:
    from steptron.monitor.server.reducer import make_reducer

    _set_up_child()
    make_reducer(*settings).serve(links, control)


def _receiver_main(*arguments: Any) -> None:
    from steptron.monitor.server.receiver import run_receiver

    _set_up_child()
    run_receiver(*arguments)
