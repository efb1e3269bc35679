"""The text that a new tokenizer is trained on: a share of each source, taken evenly from all of it.

sizes, weights → quotas → sampled texts of each source → tokenizer.train → tokenizer.json
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from steptron.data import tokenizer
from steptron.data.readers import Item, Unread

MOST_BYTES = 64 * 2**20
"""The largest amount of text that a tokenizer is trained on, in bytes."""


def quotas(sizes: Mapping[str, int], weights: Mapping[str, float] | None) -> dict[str, float]:
    """Return the bytes of text to take from each source. `weights`: their shares, None in proportion to the sizes.

    The shares are kept: where a source is smaller than its share, less is taken from the others too.
    """
    weights = weights or sizes
    total = sum(weights.values()) or 1
    shares = {name: weights[name] / total for name in sizes}
    most = min([MOST_BYTES, *(sizes[name] / share for name, share in shares.items() if share)])
    return {name: most * share for name, share in shares.items()}


def train_on(
    sources: Mapping[str, Sequence[Item]],
    weights: Mapping[str, float] | None,
    vocab_size: int,
    path: Path,
    begin: Callable[[str, int], None],
    advance: Callable[[int], None],
) -> tuple[dict[str, int], list[Unread]]:
    """Train a tokenizer on the sources' text and write it to `path`.

    Returns the bytes of text taken from each source, and what was not read on the way. Trains nothing if no text is
    there. Raises DataError if there is too little for the vocabulary.
    """
    wanted = quotas({name: sum(item.num_bytes for item in items) for name, items in sources.items()}, weights)
    taken, unread = dict.fromkeys(sources, 0), list[Unread]()
    total = round(sum(wanted.values()))
    begin("tokenizer", total)

    def texts() -> Iterator[str]:
        for name, items in sources.items():
            for text in _sample(items, wanted[name]):
                if isinstance(text, Unread):
                    unread.append(text)
                else:
                    yield text
                    taken[name] += len(text.encode())

    found = texts()
    if (first := next(found, None)) is not None:
        tokenizer.train(chain([first], _counted(found, total, advance)), vocab_size, path)
    return taken, unread


def _counted(texts: Iterable[str], total: int, advance: Callable[[int], None]) -> Iterator[str]:
    """Yield the texts, and report `total` bytes on the way: what was estimated, whatever it turns out to be."""
    for text in texts:
        size = min(total, len(text))
        advance(size)
        total -= size
        yield text
    advance(total)


def _sample(items: Sequence[Item], quota: float) -> Iterator[str | Unread]:
    """Yield documents from evenly spaced items until their bytes reach the quota."""
    total = sum(item.num_bytes for item in items)
    chosen = items[:: max(1, int(total / max(quota, 1)))]
    for place, item in enumerate(chosen):
        room = quota / (len(chosen) - place)
        for document in item.documents():
            if room <= 0:
                break
            yield document
            if isinstance(document, str):
                size = len(document.encode())
                room -= size
                quota -= size
