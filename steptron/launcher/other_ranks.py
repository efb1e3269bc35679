"""The message from rank 0 to its launcher that the coming stage needs another number of ranks.

    rank 0: OtherRanks ─► file of NEXT_VARIABLE: ranks, run folder ─► launcher: that number of ranks, resume or again

Without the variable no launcher reads the message, and the error line has the command to type.
"""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from steptron.atomic import atomic_write
from steptron.errors import OtherRanks, typed

NEXT_VARIABLE = "STEPTRON_NEXT"
"""The environment variable with the path of the file. A launcher that can start other ranks sets it."""
CORES_VARIABLE = "STEPTRON_CORES"
"""The environment variable with the number of cores that were shared out between the ranks, as launch/env.sh does."""


class Next(NamedTuple):
    """The ranks that a launcher has to start."""

    ranks: int
    folder: str
    """The folder of the run to resume. Empty: the same command is repeated."""


def tell_launcher(stop: OtherRanks) -> None:
    """Write the message, if the launcher of this rank reads it."""
    if path := os.environ.get(NEXT_VARIABLE):
        with atomic_write(Path(path)) as part:
            part.write_text(f"{stop.ranks}\n{stop.folder}\n")


def read_next(path: Path) -> Next | None:
    """Return the message; None if there is none."""
    if not path.exists():
        return None
    ranks, folder = path.read_text().split("\n")[:2]
    return Next(int(ranks), folder)


def way_on(stop: OtherRanks, argv: Sequence[str]) -> str:
    """Return the end of the error's line: what happens next, or the command to type. `argv`: the command's words."""
    saved = "the run is saved; " if stop.folder else ""
    if NEXT_VARIABLE in os.environ:
        return f"{saved}its launcher starts that number"
    words = ("resume", stop.folder) if stop.folder else tuple(argv)
    here, all_ranks = (os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if here != all_ranks:  # on several nodes
        return f"{saved}start {typed(*words)} on {stop.ranks} ranks, with launch/node.sh on as many nodes as they need"
    if stop.ranks == 1:
        return f"{saved}type {typed(*words)}"
    command = ["torchrun", "--nproc-per-node", str(stop.ranks), "-m", "steptron", *words]
    return f"{saved}type `{shlex.join(command)}`"
