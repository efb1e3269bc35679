"""Files behind URLs (fsspec): listed once, and copied into a local cache of bounded size while they are read.

s3://…, gs://…, https://…, hf://datasets/… → find_remote → Remote (url, size, version) → Cache.opened → local path

Processes share the cache. A file that some process reads is kept; of the others, the one that was used the longest time
ago makes room first.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from steptron.data.opening import why
from steptron.errors import DataError

_TMP = ".part"
_VERSION_KEYS = frozenset(["ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "Content-MD5"])
"""The facts about a file by which some file systems tell that it has changed; the key of others has them."""


@dataclass(frozen=True)
class Remote:
    """A file behind a URL."""

    url: str
    num_bytes: int
    version: str
    """A text that changes when the file changes, as far as its server tells."""
    named: bool
    """True if the input names it by itself or by a pattern."""


@dataclass(frozen=True)
class Cache:
    """A folder of copies of remote files, of at most max_bytes together."""

    folder: Path
    max_bytes: int

    @contextmanager
    def opened(self, remote: Remote) -> Iterator[Path]:
        """Yield a local copy of the file, which stays until the block ends. Raises DataError if there is no room, and
        what the file's server raises."""
        folder = self.folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        key = hashlib.blake2b(f"{remote.url} {remote.version}".encode(), digest_size=16).hexdigest()
        path = folder / (key + "-" + PurePosixPath(remote.url.partition("?")[0]).name[-80:])
        with _lock_of(path).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                self._copy(remote, path)
            os.utime(path)
            yield path

    def _copy(self, remote: Remote, path: Path) -> None:
        part = path.with_name(path.name + _TMP)
        with (path.parent / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._make_room(remote, path.parent)
            with part.open("wb") as file:
                file.truncate(remote.num_bytes)  # its room is taken from now on
        try:
            filesystem, place = _filesystem(remote.url)
            with filesystem.open(place, "rb") as source, part.open("r+b") as target:
                shutil.copyfileobj(source, target, 2**20)
                target.truncate()
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, remote: Remote, folder: Path) -> None:
        if remote.num_bytes > self.max_bytes:
            raise DataError(
                f"{remote.url} has {remote.num_bytes:,} bytes, and the cache {self.folder} holds {self.max_bytes:,}: "
                "give more with --cache-size"
            )
        files = [path for path in folder.iterdir() if not path.name.startswith(".")]
        used = sum(path.stat().st_size for path in files)
        for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
            if used + remote.num_bytes <= self.max_bytes:
                return
            used -= _removed(path)
        if used + remote.num_bytes > self.max_bytes:
            raise DataError(
                f"{remote.url} does not fit into the cache {self.folder}: {used:,} of {self.max_bytes:,} bytes are in "
                "use by other processes: give more with --cache-size, or use fewer --workers"
            )


DEFAULT_CACHE = Cache(Path("~/.cache/steptron"), 64 * 10**9)


def find_remote(spec: str) -> list[Remote]:
    """Return the files of a URL, of those below it, or of a pattern. Raises DataError if they cannot be listed."""
    try:
        filesystem, place = _filesystem(spec)
        has_pattern = any(sign in place for sign in "*[") and not filesystem.exists(place)
        below = not has_pattern and filesystem.isdir(place)
        found = filesystem.glob(place) if has_pattern else filesystem.find(place) if below else [place]
        files = []
        for name in sorted(str(name) for name in found):
            hidden = any(part.startswith(".") for part in name.removeprefix(place).split("/"))
            info = filesystem.info(name)
            if info["type"] == "file" and not (below and hidden):
                url = filesystem.unstrip_protocol(name)
                size = info.get("size")
                if size is None:
                    raise OSError("the server does not say how large the file is")
                version = [filesystem.ukey(name), size, *(info[key] for key in sorted(info) if key in _VERSION_KEYS)]
                files.append(Remote(url, int(size), " ".join(map(str, version)), not below))
    except ImportError as error:
        raise DataError(f"{spec}: {why(error)}") from error
    except Exception as error:  # each file system raises errors of its own
        raise DataError(
            f"{spec} cannot be listed ({why(error)}): check the address, the network and the credentials"
        ) from error
    if not files:
        raise DataError(f"{spec}: no files found there: give the address of a file, a folder or a pattern")
    return files


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(url)


def _lock_of(path: Path) -> Path:
    """Return the lock that a process holds while it copies or reads the file."""
    return path.with_name(f".{path.name.removesuffix(_TMP)}.lock")


def _removed(path: Path) -> int:
    """Remove a file that no process uses. Returns the bytes that became free."""
    with _lock_of(path).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return 0
        size = path.stat().st_size
        path.unlink()
        return size
