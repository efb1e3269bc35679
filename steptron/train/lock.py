"""One process tree at a time works in a run folder.

`run.lock` is locked by rank 0 as long as it lives: the kernel lets go of a dead owner's lock. Where nodes do not see each other's locks
(NFS without a lock daemon, some Lustre mounts) its content speaks: a live owner counts it up, one that has stopped counting is dead.

    the kernel's lock is ours, nobody of another host in the file ──► ours
    else: who is in it does not count up for `patience_s` ──► our name in it ──► still ours two beats later ──► ours
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from steptron.errors import RecipeError

NAME = "run.lock"

BEAT_S = 5.0
"""How often a live owner counts up."""

PATIENCE_S = 30.0
"""How long an owner of another host that does not count up is waited for before it is taken for dead."""


class _HeldError(RecipeError):
    """A live process has the lock."""


@contextmanager
def lock(folder: Path, wait_s: float = 0.0, beat_s: float = BEAT_S, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold the folder's lock inside. Raises `RecipeError` where a live process holds it, and does not let go within `wait_s`, and where
    the file cannot be written."""
    me = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "token": os.urandom(8).hex(),
    }
    file = _File(folder)
    try:
        _wait(wait_s, lambda: _claim(file, me, patience_s, 2 * beat_s))
        done = threading.Event()
        thread = threading.Thread(target=_beat, args=(file, me, done, beat_s), name="lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            with suppress(OSError):  # what ends the run may be the disk, and is the error to be seen
                os.ftruncate(file.descriptor, 0)
    finally:
        file.close()


def owner(folder: Path) -> str | None:
    """Who trains in the folder, in words; None where nobody says so. Takes no lock, so a dead owner of another host may be named."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        found = _read(descriptor)
    finally:
        os.close(descriptor)
    if not found or (found["host"] == socket.gethostname() and not Path(f"/proc/{found['pid']}").exists()):
        return None
    return _name(found)


class _File:
    """The lock file of a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.descriptor = -1

    def look(self) -> tuple[dict[str, Any], bool]:
        """Who is in it, and whether the kernel's lock is ours: not where the file system has none. Raises `RecipeError`.

        It is opened anew each time: only so does NFS show what other nodes have written since. (Closing it lets go of the lock.)"""
        self.close()
        try:
            self.descriptor = os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self.cannot_be_written(error) from error
        try:
            locks = try_lock(self.descriptor)
        except OSError:
            return _read(self.descriptor), False
        if not locks:
            raise self.held(_read(self.descriptor))
        return _read(self.descriptor), True

    def held(self, found: dict[str, Any]) -> _HeldError:
        """The error that names the owner."""
        who = _name(found) if found else "another process"
        return _HeldError(f"{self.folder} is being trained by {who}; stop that run first, or wait for its end")

    def cannot_be_written(self, error: OSError) -> RecipeError:
        """The error of a disk."""
        return RecipeError(
            f"{self.folder} cannot be written: {error.strerror}; a run needs its folder: make room, or mend the rights"
        )

    def close(self) -> None:
        """Close it where it is open."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


def _wait(wait_s: float, claim: Callable[[], None]) -> None:
    give_up, told = time.monotonic() + wait_s, False
    while True:
        try:
            return claim()
        except _HeldError as held:
            if time.monotonic() >= give_up:
                raise
            if not told:
                print(f"waiting up to {wait_s:.0f} s: {held}", file=sys.stderr, flush=True)
            told = True
        time.sleep(1.0)


def _claim(file: _File, me: dict[str, Any], patience_s: float, settle_s: float) -> None:
    """Make the file ours. Raises `RecipeError` where it is another's, or cannot be written."""
    found, locks = file.look()
    by_content = not locks or (bool(found) and found["host"] != me["host"])
    deadline = time.monotonic() + patience_s
    while by_content and found and time.monotonic() < deadline:
        time.sleep(min(1.0, patience_s / 10))
        now, _ = file.look()
        if now and now != found:
            raise file.held(now)
        found = now
    try:
        _write(file.descriptor, me, 0)
    except OSError as error:
        raise file.cannot_be_written(error) from error
    # Others may have found the file free at the same time, or be alive and late: the last to write keeps it, and an owner beats once more.
    deadline = time.monotonic() + settle_s
    while by_content and time.monotonic() < deadline:
        time.sleep(min(1.0, settle_s / 10))
        found, _ = file.look()
        if found.get("token") != me["token"]:
            raise file.held(found)


def try_lock(descriptor: int) -> bool:
    """Whether the file's lock is ours now. Raises `OSError` where there are no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # systems have either for a lock that another holds
        return False
    return True


def _name(found: dict[str, Any]) -> str:
    return f"process {found['pid']} on host {found['host']}, since {found['since']}"


def _beat(file: _File, me: dict[str, Any], done: threading.Event, beat_s: float) -> None:
    count = 0
    while not done.wait(beat_s):
        count += 1
        with suppress(OSError):  # a full disk must not cost the lock
            _write(file.descriptor, me, count)


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # empty, or just being written
        return {}
    return found if isinstance(found, dict) and {"pid", "host", "since"} <= set(found) else {}


def _write(descriptor: int, me: dict[str, Any], count: int) -> None:
    os.pwrite(descriptor, json.dumps(me | {"count": count}).ljust(512).encode(), 0)
    os.fsync(descriptor)  # an NFS client may keep it for half a minute else
