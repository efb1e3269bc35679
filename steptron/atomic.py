"""Files that are there whole or not at all, for everything that a reader may open while it is written, or after a crash."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """Yield `PATH.tmp` to be written; at the end it takes the place of `path` in one go.

    An error inside, a full disk say, removes it again and is raised; what `path` was before stays. `synced`: have it on the disk first."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        if synced:
            sync(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync(path: Path | str) -> None:
    """Write a file, or a folder's list of names, to the disk before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
