"""The protocol between ranks and server, over Arrow Flight.

    rank                                                server
    DoAction "receivers"                         ──►    ports of the receivers; a rank takes one of them
    DoPut, descriptor = Hello                    ──►
      record batch `values` float32 [slots],     ──►
      with the step as its metadata (int64)             (none for a step whose values were lost: the signal alone)
                                                 ◄──    n (int64): the first n frames of this stream are on disk
                                                        −1: no more of this stream; the error says why
    DoGet, ticket = {"run": …, "sql": …}         ──►    rows

Every call carries `authorization: Bearer TOKEN` if the server asks for one.
"""

import json
import math
import re
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from steptron.config.monitoring import SERVED_RUN
from steptron.errors import SteptronError
from steptron.monitor.statistics.merge import MAX_SLOTS
from steptron.monitor.statistics.registry import Registry

SCHEMA = pa.schema([pa.field("values", pa.float32())])
"""The schema of a frame."""
MAX_RANKS, MAX_SERVERS = 1 << 20, 1 << 12
"""The largest numbers of ranks and of servers of a run."""
RECEIVERS = "receivers"
"""The action that returns the receivers' ports."""

_NUMBER = struct.Struct("<q")
_UID = re.compile(r"[0-9A-Za-z]{8,64}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_AXIS = re.compile(r"(?!registry|spool)[a-z][a-z0-9_]{0,31}")
"""Names of axes become names of folders."""


class RefusedError(Exception):
    """A refusal by a server. `kind` is short and one of few, because refusals are counted by it."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


@dataclass(frozen=True, kw_only=True)
class Hello:
    """The first message of a stream: the sender, and the content of its frames."""

    run: str
    """The name of the run."""
    uid: str
    """The identity of the run, which another run of the same name does not have."""
    rank: int
    """The rank that sends the frames."""
    ranks: int
    """The number of ranks of the run that send frames: 0 to ranks − 1."""
    server: int
    """The server's position in the run's list of servers."""
    servers: int
    """The length of that list. Rank r sends to servers[r % servers]."""
    attempt: int
    """The number of the attempt: the same on all ranks, higher after every start and rewind."""
    resumed: int
    """The step from which this attempt continues; 0 for the start of the run.

    Stored values of later steps belong to another attempt.
    """
    late: bool
    """True for frames of earlier attempts, up to step `resumed`, that no server has confirmed."""
    registry: dict[str, Any]
    """`Registry.to_dict()` of the frames."""

    def encode(self) -> bytes:
        """Return it in the form in which it is sent."""
        return json.dumps(asdict(self)).encode()


def decode_hello(data: bytes) -> Hello:
    """Decode a hello. Raises `RefusedError` unless it is complete and consistent."""
    try:
        values = json.loads(data)
        hello = Hello(**values)
    except (ValueError, TypeError, RecursionError) as error:  # JSON that is nested too deeply raises RecursionError
        raise RefusedError("not a hello", str(error)[:200]) from error
    numbers = [hello.rank, hello.ranks, hello.server, hello.servers, hello.attempt, hello.resumed]
    if any(type(number) is not int or not 0 <= number < 1 << 62 for number in numbers) or type(hello.late) is not bool:
        raise RefusedError("not a hello", f"rank, ranks, server, servers, attempt, resumed: {numbers}")
    if max(hello.rank, hello.ranks - 1) >= MAX_RANKS or hello.servers > MAX_SERVERS:
        raise RefusedError("rank", f"{MAX_RANKS} ranks and {MAX_SERVERS} servers at most: {numbers}")
    check_run(hello.run)
    if not isinstance(hello.uid, str) or not _UID.fullmatch(hello.uid):
        raise RefusedError("not a hello", f"uid {str(hello.uid)[:80]!r}")
    if not (hello.server < hello.servers and (hello.late or hello.rank < hello.ranks)):
        raise RefusedError("rank", f"rank {hello.rank} of {hello.ranks}, server {hello.server} of {hello.servers}")
    if not hello.late and hello.rank % hello.servers != hello.server:
        raise RefusedError("rank", f"rank {hello.rank} does not belong to server {hello.server} of {hello.servers}")
    return hello


def check_run(name: Any) -> None:
    """Raise `RefusedError` unless `name` can be the name of a run, which is also the name of a folder."""
    if not isinstance(name, str) or not SERVED_RUN.fullmatch(name):
        raise RefusedError("run name", f"{str(name)[:80]!r}: letters, digits, '.', '_' and '-' only")


def decode_registry(values: Any) -> Registry:
    """Decode a registry. Raises `RefusedError` unless it is valid and not too large."""
    try:
        registry = Registry.from_dict(values)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise RefusedError("not a registry", str(error)[:200]) from error
    for name in [*registry.statistics, *registry.derived]:
        if not _NAME.fullmatch(name):
            raise RefusedError("not a registry", f"a statistic is called {name[:80]!r}")
    for axis in {axis for grid in registry.grids() for axis in grid}:
        kinds = {type(value) for value in axis.values}
        if not _AXIS.fullmatch(axis.name) or kinds not in ({int}, {str}) or len(set(axis.values)) < len(axis.values):
            raise RefusedError(
                "not a registry", f"axis {axis.name[:80]!r} has no name, no values, or the same value twice"
            )
        if kinds == {int} and not all(-(1 << 31) <= int(value) < 1 << 31 for value in axis.values):
            raise RefusedError("not a registry", f"axis {axis.name!r} has values beyond 32 bits")
    if sum(math.prod(statistic.shape) for statistic in registry.statistics.values()) > MAX_SLOTS:
        raise RefusedError("size", f"more than {MAX_SLOTS} slots")
    return registry


def encode_number(number: int) -> bytes:
    """Encode a step or a number of frames."""
    return _NUMBER.pack(number)


def decode_number(data: bytes | None) -> int:
    """Decode a number. Raises `RefusedError` unless it can be a step."""
    if data is None or len(data) != _NUMBER.size:
        raise RefusedError("step", f"{_NUMBER.size} bytes expected, {len(data or b'')} came")
    (number,) = _NUMBER.unpack(data)
    if not 0 <= number < 1 << 40:
        raise RefusedError("step", f"{number} is none")
    return number


def read_token(path: str | Path) -> str:
    """Return the token in a file. Raises `SteptronError` if there is none."""
    try:
        token = Path(path).read_text().strip()
    except OSError as error:
        raise SteptronError(f"the token file {path} cannot be read: {error.strerror}") from error
    if not token or not token.isascii():
        raise SteptronError(
            f"the token file {path} holds no token: one line of ASCII, for example of `openssl rand -hex 32`"
        )
    return token


def read_file(path: str | Path, what: str) -> bytes:
    """Return the content of a certificate or key. Raises `SteptronError` if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SteptronError(f"the {what} {path} cannot be read: {error.strerror}") from error


def call_headers(token: str | None) -> list[tuple[bytes, bytes]]:
    """Return the headers of every call."""
    return [(b"authorization", f"Bearer {token}".encode())] if token else []
