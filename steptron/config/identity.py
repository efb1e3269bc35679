"""run.json in a run folder: the identity of the run, the number of its newest start, and the folder's path at that
start.

    {"id": …, "attempt": …, "place": …, "copy_of": …, "parent": …}   rank 0 writes it at each start, while it holds the
                                                                     folder's lock

W&B and the metrics servers know the run by `id`. `place` tells whether a folder was moved or copied:

    place is here                                    ──► the same run
    another folder at `place` has the same id        ──► this one is a copy: a new run with an id of its own
    nothing with that id is at `place` (any more)    ──► the same run, moved

Only paths that this machine can see count. A folder whose `place` is out of sight (another host, another mount) counts
as moved.
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
"""The least difference between the numbers of two starts. Rewinds within the first start use the numbers in between."""


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The run that a fork has started from."""

    id: str
    """Its `Identity.id`. Empty if its folder had no run.json."""
    name: str
    """Its `run.name`."""
    place: str
    """The absolute path of its folder at that time."""
    step: int
    """The step of the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The identity of a run."""

    id: str
    """16 hexadecimal digits that belong to this run only."""
    attempt: int
    """The number of the newest start. It is always higher than the number before, whatever the clock says."""
    place: str
    """The absolute path of the folder at that start. Empty in a folder that was restored from a mirror."""
    copy_of: str = ""
    """The `id` of the run that this folder is a copy of. Empty if it is not a copy."""
    parent: Parent | None = None
    """The run that this one was forked from. None: it began at its first step."""

    def to_json(self) -> str:
        """Return the content of run.json."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read(folder: Path) -> Identity | None:
    """Return the identity of the run in `folder`, or None without run.json. Raises `RecipeError` if the file is
    damaged."""
    path = folder / NAME
    try:
        values = dict(json.loads(path.read_text()))
        parent = values.pop("parent", None)
        found = Identity(**values, parent=Parent(**parent) if parent else None)
        texts, numbers = [found.id, found.place, found.copy_of], [found.attempt]
        if found.parent:
            texts += [found.parent.id, found.parent.name, found.parent.place]
            numbers += [found.parent.step]
        if not all(type(text) is str for text in texts) or not all(type(number) is int for number in numbers):
            raise ValueError("a value of the wrong type")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(
            f"{path} cannot be read ({error}): restore it, or delete it; the run then gets a new id for W&B and the "
            "metrics servers"
        ) from error
    return found


def without_place(text: str) -> str:
    """Return the content of a run.json from a mirror without `place`, because that folder is lost."""
    return json.dumps(json.loads(text) | {"place": ""}, indent=1) + "\n"


def is_copy(known: Identity, folder: Path) -> bool:
    """Return whether `folder`, which holds `known`, is a copy: another folder, at the recorded path, belongs to the
    same run."""
    place = Path(known.place)
    try:
        original = read(place) if known.place else None
        return original is not None and original.id == known.id and not os.path.samefile(place, folder)
    except (OSError, RecipeError):  # the path cannot be seen from here
        return False


def at_start(known: Identity | None, folder: Path) -> Identity:
    """Return the content of run.json for a new start of the run in `folder`. `known` is its content before, None for a
    new run."""
    last = known.attempt if known else 0
    # The clock makes a folder that was restored from an older copy exceed the starts that this copy does not know of.
    attempt = max(last + APART, time.time_ns())
    place = os.path.realpath(folder)
    if known is None:
        return Identity(id=secrets.token_hex(8), attempt=attempt, place=place)
    if is_copy(known, folder):
        return Identity(id=secrets.token_hex(8), attempt=attempt, place=place, copy_of=known.id, parent=known.parent)
    return Identity(id=known.id, attempt=attempt, place=place, copy_of=known.copy_of, parent=known.parent)
