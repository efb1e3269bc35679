"""run.json in a run folder: who the run is, how often it was started, and where its folder was then.

    {"id": …, "attempt": …, "place": …, "copy_of": …}     written at each start, by rank 0, which has the folder's lock

`id` is what W&B and the metrics servers know the run by. A folder tells by `place` whether it was moved or copied:

    place is here                                    ──► the same run
    another folder at `place` has the same id        ──► this one is a copy: a run of its own, with an id of its own
    nothing with that id is at `place` (any more)    ──► the same run, moved

Only paths that can be seen from here count. A folder whose `place` cannot be seen (another host, another mount) is taken for moved.
"""

import json
import os
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from steptron.errors import RecipeError

NAME = "run.json"

APART = 1 << 20
"""The least difference between the numbers of two starts. Rewinds of the first start use the numbers in between."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who a run is."""

    id: str
    """16 hexadecimal digits, of this run and no other."""
    attempt: int
    """Number of the newest start: always higher than that of the one before, whatever the clock says."""
    place: str
    """Absolute path of the folder at that start; empty in one that was brought back from a second place."""
    copy_of: str = ""
    """`id` of the run whose folder this one is a copy of; empty: it is none."""

    def to_json(self) -> str:
        """Return the content of run.json."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read(folder: Path) -> Identity | None:
    """Return who the run in `folder` is; None where run.json is not there. Raises `RecipeError` where it is damaged."""
    path = folder / NAME
    try:
        values = json.loads(path.read_text())
        found = Identity(**values)
        if type(found.attempt) is not int or not all(type(t) is str for t in (found.id, found.place, found.copy_of)):
            raise ValueError("a value of the wrong type")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(
            f"{path} cannot be read ({error}): bring it back, or delete it: the run then gets a new id for W&B and metrics servers"
        ) from error
    return found


def without_place(text: str) -> str:
    """Return the content of a run.json from a second place without `place`, because that folder is lost."""
    return json.dumps(json.loads(text) | {"place": ""}, indent=1) + "\n"


def is_copy(known: Identity, folder: Path) -> bool:
    """Return whether `folder`, which holds `known`, is a copy: another folder, at the recorded place, is of the same run."""
    place = Path(known.place)
    try:
        original = read(place) if known.place else None
        return original is not None and original.id == known.id and not os.path.samefile(place, folder)
    except (OSError, RecipeError):  # what cannot be seen from here
        return False


def at_start(known: Identity | None, folder: Path) -> Identity:
    """Return what run.json is to hold once the run in `folder` has been started again; `known`: what it held before, None for a new run."""
    last = known.attempt if known else 0
    # Like the clock's, so that a folder that was brought back from an older copy is ahead of the starts that this copy does not know.
    attempt = max(last + APART, time.time_ns())
    place = os.path.realpath(folder)
    if known is None:
        return Identity(id=secrets.token_hex(8), attempt=attempt, place=place)
    if is_copy(known, folder):
        return Identity(id=secrets.token_hex(8), attempt=attempt, place=place, copy_of=known.id)
    return Identity(id=known.id, attempt=attempt, place=place, copy_of=known.copy_of)
