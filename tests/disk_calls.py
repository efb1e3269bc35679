"""A record of the disk calls of a process: the files that were synced, and in which state, at each rename or creation."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass
class DiskCalls:
    """Syncs and renames of this process, in order."""

    unsynced: dict[Path, list[str]] = field(default_factory=dict)
    """The parts of a renamed file or folder that were not on the disk yet, by the target of the rename. `.` is the folder's
    own list of files."""
    synced: dict[Path, tuple[int, int]] = field(default_factory=dict)
    """Size and time of the last change of each file, as it was when it was synced; of a folder, too."""
    order: list[tuple[str, Path]] = field(default_factory=list)
    """All of them: ("sync", path) and ("rename", target)."""

    def is_on_disk(self, path: Path) -> bool:
        """Whether the path was synced after it was last written."""
        return self.synced.get(path) == _version(path)


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def recorded() -> Iterator[DiskCalls]:
    """Record the calls of this process inside the block; they are carried out as ever."""
    calls = DiskCalls()
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def sync(descriptor) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        fsync(number)
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        calls.synced[path] = _version(path)
        calls.order.append(("sync", path))

    def watched(move):
        def moved(source, target, **options) -> None:
            source, target = Path(source), Path(target)
            inside = [source, *sorted(source.iterdir())] if source.is_dir() else [source]
            calls.unsynced[target] = [str(path.relative_to(source)) for path in inside if not calls.is_on_disk(path)]
            move(source, target, **options)
            calls.order.append(("rename", target))

        return moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        patch.setattr(os, "fdatasync", sync)
        patch.setattr(os, "rename", watched(rename))
        patch.setattr(os, "replace", watched(replace))
        yield calls
