"""Frames that no server has confirmed: in memory first, then on local disk, within bounds.

    add ─► memory ── more than MEMORY_BYTES: keeper thread ──► spool/rank-00003/00000042-IDENTITY.npy
                                                               if it is full, the oldest frames are dropped

`add` never waits. When a process ends, its frames stay in the spool. A run that is resumed sends them, except those of
steps that it repeats. The frames of ranks that no longer exist are taken over by ranks that do.
"""

import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steptron.atomic import atomic_write

MEMORY_BYTES = 32 << 20
"""The number of bytes of frames kept in memory. Further frames go to the spool."""
MAX_MEMORY_BYTES = 128 << 20
"""The number of bytes above which the oldest frames in memory are dropped, if the disk is too slow or full."""

log = logging.getLogger("steptron")


@dataclass(kw_only=True)
class UnconfirmedFrame:
    """A frame that no server has confirmed."""

    step: int
    rank: int
    identity: str
    """The identity of its registry."""
    late: bool
    """True if it belongs to an attempt that is over."""
    values: np.ndarray | None
    """The values, if the frame is in memory."""
    path: Path | None = None
    """The path, if the frame is on disk."""
    nbytes: int = 0

    def load(self) -> np.ndarray | None:
        """Return the values, or None if they were on disk and no longer are."""
        values, path = self.values, self.path
        if values is not None or path is None:
            return values
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError):
            return None


class Backlog:
    """The unconfirmed frames of one rank, for use by several threads."""

    def __init__(
        self, spool: Path, rank: int, writers: int, registry: Mapping[str, Any], identity: str, buffer_mb: int
    ):
        """Open the backlog of `rank`, one of `writers`. `spool` is the folder of all ranks' spools."""
        self._spool, self._rank, self._writers = spool, rank, writers
        self._identity, self._limit = identity, buffer_mb << 20
        self.registries: dict[str, Mapping[str, Any]] = {identity: registry}
        """The registries by identity, also those of adopted frames."""
        self.change = threading.Condition()
        """The condition that is notified when frames come or go."""
        self._disk_lock = threading.Lock()
        """One thread writes to the spool at a time; taken before `change`."""
        self._held: dict[int, UnconfirmedFrame] = {}
        self._count = self._memory = self._disk = 0
        self._warned = self._stopped = False
        self.dropped = 0
        """The number of frames that were dropped for lack of room."""
        self._keeper = threading.Thread(target=self._keep, name="metrics spool", daemon=True)
        self._keeper.start()

    def __len__(self) -> int:
        return len(self._held)

    def add(self, step: int, values: np.ndarray) -> None:
        """Take a frame; the values must not be changed afterwards."""
        with self.change:
            self._shrink(MAX_MEMORY_BYTES - values.nbytes, "neither the server nor the disk follows")
            held = UnconfirmedFrame(
                step=step, rank=self._rank, identity=self._identity, late=False, values=values, nbytes=values.nbytes
            )
            self._insert(held)
            self._memory += held.nbytes
            self.change.notify_all()

    def following(self, number: int) -> tuple[int, UnconfirmedFrame] | None:
        """Return the number and frame of the first frame above `number`, or None. Newer frames have larger numbers."""
        with self.change:
            return next(((n, held) for n, held in self._held.items() if n > number), None)

    def confirm(self, number: int) -> None:
        """Forget a frame: the server has it on disk, or it can no longer be sent."""
        with self.change:
            if number in self._held:
                self._forget(self._held.pop(number))
                self.change.notify_all()

    def go_back(self, step: int) -> None:
        """Begin another attempt at `step`: frames of later steps are dropped, the others become late."""
        with self.change:
            kept = []
            for held in self._held.values():
                if held.step <= step:
                    held.late = True
                    kept.append(held)
                else:
                    self._forget(held)
            self._held = {}
            for held in kept:
                self._insert(held)
            self.change.notify_all()

    def adopt(self, resumed: int | None) -> None:
        """Take over frames of earlier attempts in the spool, up to step `resumed` (None: of no step); delete others."""
        for folder in sorted(self._spool.glob("rank-*")):
            number = folder.name.removeprefix("rank-")
            if not number.isdigit() or int(number) % self._writers != self._rank:
                continue
            for path in folder.glob("registry-*.json"):
                try:
                    self.registries.setdefault(path.stem.removeprefix("registry-"), json.loads(path.read_text()))
                except (OSError, ValueError):
                    continue
            for path in sorted(folder.glob("*.npy")):
                step, _, identity = path.stem.partition("-")
                if resumed is None or not step.isdigit() or int(step) > resumed or identity not in self.registries:
                    path.unlink(missing_ok=True)
                    continue
                held = UnconfirmedFrame(
                    step=int(step), rank=int(number), identity=identity, late=True, values=None, path=path
                )
                held.nbytes = path.stat().st_size
                with self.change:
                    self._insert(held)
                    self._disk += held.nbytes

    def to_disk(self, keep_bytes: int = 0) -> None:
        """Write the newest frames to the spool until only `keep_bytes` are left in memory.

        If the spool cannot be written, the oldest frames are dropped instead.
        """
        with self._disk_lock:
            with self.change:
                left, chosen = self._memory, []
                for number, held in reversed(self._held.items()):
                    if left <= keep_bytes:
                        break
                    if held.values is not None:
                        left -= held.nbytes
                        chosen.append((number, held))
            try:
                for number, held in reversed(chosen):
                    self._write(number, held)
            except OSError as error:
                with self.change:
                    self._shrink(
                        max(keep_bytes, 0 if self._stopped else MEMORY_BYTES), f"the spool cannot be written: {error}"
                    )

    def close(self) -> None:
        """Write all frames to disk and stop the thread."""
        with self.change:
            self._stopped = True
            self.change.notify_all()
        self._keeper.join()
        self.to_disk()

    def folder(self, rank: int) -> Path:
        """Return the folder of a rank's frames."""
        return self._spool / f"rank-{rank:05d}"

    def _insert(self, held: UnconfirmedFrame) -> None:
        self._count += 1
        self._held[self._count] = held

    def _keep(self) -> None:
        """Run the keeper thread."""
        while True:
            with self.change:
                self.change.wait_for(lambda: self._stopped or self._memory > MEMORY_BYTES)
                if self._stopped:
                    return
            self.to_disk(MEMORY_BYTES)

    def _write(self, number: int, held: UnconfirmedFrame) -> None:
        """Write one frame to the spool. Raises OSError."""
        folder, values = self.folder(held.rank), held.values
        path = folder / f"{held.step:08d}-{held.identity}.npy"
        if values is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        registry = folder / f"registry-{held.identity}.json"
        if not registry.exists():
            with atomic_write(registry) as temporary:
                temporary.write_text(json.dumps(self.registries[held.identity]))
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.save(file, values)
        with self.change:
            if self._held.get(number) is not held:  # confirmed or dropped in the meantime
                path.unlink(missing_ok=True)
                return
            self._memory -= held.nbytes
            self._disk += held.nbytes
            held.path, held.values = path, None
            while self._disk > self._limit:
                oldest = next(n for n, one in self._held.items() if one.path is not None)
                self._forget(self._held.pop(oldest))
                self._drop(f"the {self._limit >> 20} MiB of monitor.server.buffer_mb are full")

    def _shrink(self, limit: int, reason: str) -> None:
        """Drop the oldest frames in memory until they take no more than `limit` bytes."""
        in_memory = (
            [number for number, held in self._held.items() if held.values is not None] if self._memory > limit else []
        )
        for number in in_memory:
            if self._memory <= limit:
                break
            self._forget(self._held.pop(number))
            self._drop(reason)
        self.change.notify_all()

    def _forget(self, held: UnconfirmedFrame) -> None:
        """Free the room of a frame."""
        if held.values is not None:
            self._memory -= held.nbytes
        elif held.path is not None:
            self._disk -= held.nbytes
            held.path.unlink(missing_ok=True)
        held.values = None

    def _drop(self, reason: str) -> None:
        self.dropped += 1
        if not self._warned:
            log.warning("steps of metrics are dropped, the oldest first: %s", reason)
        self._warned = True
