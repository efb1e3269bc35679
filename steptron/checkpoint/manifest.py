"""`manifest.json`: the description of a checkpoint and of its files.

It is written last, so a folder without it is not complete.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from steptron.errors import CheckpointError

NAME = "manifest.json"
VERSION = 3
ABANDONED = "abandoned-"
"""The prefix of checkpoints that were put aside, because the run has continued from before them."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of the checkpoint."""

    bytes: int
    blake2b: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of a checkpoint, and all of its state that is not a tensor."""

    step: int
    """The number of finished optimizer steps."""
    counters: dict[str, Any]
    """The state of the run between two steps, as JSON values."""
    recipe_hash: str
    """The hash of the fixed part of the recipe."""
    layout: dict[str, Any]
    """The sizes of both mesh views. A checkpoint loads into any other layout."""
    torch: str
    """The version of torch that wrote it."""
    files: dict[str, FileEntry]
    """The size and the checksum of each file, by name."""
    steptron: str
    """The version of Steptron that wrote it."""
    origin: dict[str, str] = field(default_factory=dict)
    """The commit, the command line, the host and the versions of the process that wrote it (`origin.origin`). Empty in
    checkpoints that were written before this key existed."""
    version: int = VERSION
    """The version of this description."""


def step_name(step: int) -> str:
    """Return the name of the folder of that step's checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's folder is named after, or −1 if the name has none."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders of checkpoints, newest first, complete or not."""
    return sorted(folder.glob("step-*"), reverse=True)


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json` into a checkpoint's folder, with a checksum of itself. It lists all other files."""
    values = json.loads(json.dumps(asdict(manifest)))  # as it will be read: with keys that are strings
    (folder / NAME).write_text(json.dumps(values | {"blake2b": _digest(values)}, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Return a checkpoint's description. Raises `CheckpointError` if it is missing, damaged or of another version."""
    try:
        values = json.loads((folder / NAME).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {NAME}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / NAME} cannot be read: {error}") from error
    known = {field.name for field in fields(Manifest)} | {"blake2b"}
    if not isinstance(values, dict) or values.get("version") != VERSION or set(values) | {"origin"} != known:
        raise CheckpointError(f"{folder / NAME} is not a manifest of version {VERSION}; this steptron cannot read it")
    if values.pop("blake2b") != _digest(values):
        raise CheckpointError(f"{folder.name} is damaged: checksum mismatch in {NAME}")
    entries = {name: FileEntry(**entry) for name, entry in values.pop("files").items()}
    if odd := [name for name in entries if Path(name).name != name]:
        raise CheckpointError(f"{folder / NAME} names files that are not in its folder: {odd[0]!r}")
    return Manifest(files=entries, **values)


def _digest(values: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def describe_file(path: Path) -> FileEntry:
    """Return the size and the checksum of a file."""
    with path.open("rb") as file:
        return FileEntry(bytes=path.stat().st_size, blake2b=hashlib.file_digest(file, hashlib.blake2b).hexdigest()[:32])


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Compare every file's size with the manifest. Raises `CheckpointError` with the first file that differs or is
    missing."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder.name} is incomplete: {name} is missing")
        if path.stat().st_size != entry.bytes:
            raise CheckpointError(
                f"{folder.name} is incomplete: {name} has {path.stat().st_size} bytes of {entry.bytes}"
            )


def has_all_bytes(folder: Path) -> bool:
    """Return whether every file exists with its size."""
    try:
        check_sizes(folder, read_manifest(folder))
    except CheckpointError:
        return False
    return True


def check_files(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compare files (None: all) with the manifest, sizes first. Raises `CheckpointError` with the first file that
    differs."""
    check_sizes(folder, manifest)
    for name in manifest.files if names is None else names:
        try:
            found = describe_file(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder.name} cannot be read: {name}: {error.strerror}") from error
        if found.blake2b != manifest.files[name].blake2b:
            raise CheckpointError(f"{folder.name} is damaged: checksum mismatch in {name}")
