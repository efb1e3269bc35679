"""Files and folders that are complete or absent, also for a reader during the write and after a crash.

    atomic_write(path)    write .NAME.NUMBER.tmp beside it, [sync it,] rename it to PATH, [sync the parent folder]
    atomic_folder(path)   fill .tmp-NAME beside it, rename it to PATH

Without `durable` a process may die at any moment; with it the machine may also lose its power: the content is on the
disk before the name is, and the name is on the disk when the call returns.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` to be written. At the end it replaces `path` in one step.

    An error inside, such as a full disk, removes the temporary file and is raised; `path` stays as it was. Processes
    that write the same path at the same time do not share a temporary file: the last rename wins.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
            rename_durably(temporary, path)
        else:
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make the folder `.tmp-NAME` beside `path` and yield it. At the end it is renamed to `path`, durably.

    What a killed process left there is removed first. An error inside removes the folder and is raised. `path` must not
    hold anything.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    if temporary.exists():
        shutil.rmtree(temporary)
    try:
        make_folder(path.parent)
        temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        rename_durably(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, and return when their names are on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def rename_durably(old: Path, new: Path) -> None:
    """Rename a file or folder, whose content is on the disk, and return when the new name is on the disk too."""
    old.replace(new)
    sync(new.parent)


def sync_tree(folder: Path) -> None:
    """Write everything in a folder, and the folder itself, to the disk before returning."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path | str) -> None:
    """Write a file, or a folder's list of names, to the disk before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
