"""A checkpoint of one run as the first checkpoint of another."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from steptron.atomic import atomic_folder
from steptron.checkpoint.manifest import check_sizes, read_manifest, write_manifest
from steptron.errors import CheckpointError


def adopt(checkpoint: Path, folder: Path, counters: dict[str, Any]) -> Path:
    """Link a complete checkpoint into the folder of another run's checkpoints, or copy it to another file system.

    `counters`: what the new manifest says instead of the old one's (`Manifest.counters`).

    The files of a checkpoint never change, so both runs may own them; each removes only its own names. Returns the new
    path. Raises `CheckpointError` if a file is missing, because the other run has removed it meanwhile, and if the
    folder cannot be written.
    """
    final = folder / checkpoint.name
    try:
        with atomic_folder(final) as temporary:
            manifest = read_manifest(checkpoint)
            for name in manifest.files:
                _link(checkpoint / name, temporary / name)
            write_manifest(replace(manifest, counters=counters), temporary)
            check_sizes(temporary, manifest)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint} was removed while it was copied: start again, or choose one that its run keeps with --step"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror}; make room, or choose another run.dir"
        ) from error
    return final


def _link(path: Path, new: Path) -> None:
    try:
        os.link(path, new)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, new)
