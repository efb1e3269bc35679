"""The held-out split of a source: documents that no run trains on, chosen by a hash of their text.

    items of NAME ─┬─ other documents ────► NAME            for training
                   └─ held-out documents ─► NAME-held-out   for evaluation

The hash of a text decides alone on which side it is. So the order of the files does not matter, copies of a text are on
the same side, also in different sources, and a larger share holds out the same documents and more.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steptron.data.readers import Item, Unread

SUFFIX = "-held-out"
"""The end of the name of a source with held-out documents."""

Sources = dict[str, Sequence[Item]]
"""The items of each source by name."""


def is_held_out(text: str, share: float) -> bool:
    """Return whether a document belongs to the held-out `share` (0 to 1) of all documents."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=b"hold out").digest()
    return int.from_bytes(digest, "big") < share * 2**64


@dataclass(frozen=True)
class Side:
    """The documents of an item that are on one side of the split."""

    item: Item
    share: float
    held_out: bool

    @property
    def num_bytes(self) -> int:
        part = self.share if self.held_out else 1 - self.share
        return round(self.item.num_bytes * part)

    @property
    def origin(self) -> str:
        return f"{self.item.origin} {'held out of' if self.held_out else 'without'} {self.share}"

    def documents(self) -> Iterator[str | Unread]:
        """Yield the documents of this side. What is not read is reported once, by the side for training."""
        for document in self.item.documents():
            if isinstance(document, Unread):
                if not self.held_out:
                    yield document
            elif is_held_out(document, self.share) is self.held_out:
                yield document


def split(sources: Mapping[str, Sequence[Item]], share: float) -> tuple[Sources, Sources]:
    """Return the sources for training and those with the held-out documents, by name. Share 0 holds out nothing."""
    if not share:
        return dict(sources), {}
    trained, held_out = Sources(), Sources()
    for name, items in sources.items():
        trained[name] = [Side(item, share, held_out=False) for item in items]
        held_out[name + SUFFIX] = [Side(item, share, held_out=True) for item in items]
    return trained, held_out


def recorded(items: Sequence[Item], marks: str) -> dict[str, Any]:
    """Return the fields of `SourceInfo` that describe the split of these items.

    `marks`: the end of their origins that identifies metadata and masks. With and without it, the text is the same.
    """
    sides = [item for item in items if isinstance(item, Side)]
    origins = (item.item.origin if isinstance(item, Side) else item.origin for item in items)
    inputs = "\n".join(origin.removesuffix(marks) for origin in origins)
    return {
        "inputs": hashlib.blake2b(inputs.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest(),
        "hold_out": sides[0].share if sides else 0.0,
        "held_out": bool(sides) and sides[0].held_out,
    }
