"""Files that are complete or absent, for everything that may be opened while it is written, or after a crash."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """Yield `PATH.tmp` to be written. At the end it replaces `path` in one step.

    An error inside, such as a full disk, removes the temporary file and is raised; `path` stays as it was. `synced`:
    sync the file to the disk first.
    """
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
