"""A needle in a haystack: a document that states values of keys within filler, and asks for some of them at its end.

    filler ─────────────────────┐
    pairs (key, value), depths ─┴─► hide ─► filler with statements at their depths, then questions with answers

The functions take and return token ids, so they make training documents and rows of an evaluation alike.

Legend: N tokens of the document, F filler tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steptron.errors import DataError

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""The token ids of a key and of its value."""


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The token ids around a key and its value; each may be empty."""

    statement: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    """Before the key, between key and value, after the value."""
    question: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    """Before the key, between key and answer, after the answer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Haystack:
    """A document with statements and questions."""

    tokens_N: np.ndarray
    """int64."""
    statements: tuple[int, ...]
    """The number of the first token of each pair's statement."""
    answers: tuple[tuple[int, int], ...]
    """The range [start, stop) of the tokens of each question's answer, in the order of the questions."""


def draw_pairs(
    random: np.random.Generator, count: int, alphabet: Sequence[int], key_tokens: int, value_tokens: int
) -> list[Pair]:
    """Draw pairs with different keys. The tokens of keys and values are drawn from `alphabet`, evenly.

    Raises `DataError` if there are fewer than `count` keys.
    """
    if len(alphabet) ** key_tokens < count:
        raise DataError(
            f"{len(alphabet)} tokens make {len(alphabet) ** key_tokens} keys of length {key_tokens}, fewer than the "
            f"{count} pairs; ask for longer keys or fewer pairs"
        )
    values: dict[tuple[int, ...], tuple[int, ...]] = {}
    while len(values) < count:
        drawn = [alphabet[n] for n in random.integers(len(alphabet), size=key_tokens + value_tokens).tolist()]
        values.setdefault(tuple(drawn[:key_tokens]), tuple(drawn[key_tokens:]))
    return list(values.items())


def hide(
    length: int,
    filler_F: np.ndarray,
    wording: Wording,
    pairs: Sequence[Pair],
    depths: Sequence[float],
    asked: Sequence[int],
) -> Haystack:
    """Return a document of exactly `length` tokens.

    Args:
        length: the number of tokens of the document, questions and answers included.
        filler_F: token ids of the filler. It is cut, or repeated, to what is needed.
        wording: the tokens around keys and values.
        pairs: the pairs that are stated.
        depths: for each pair, the share of the filler that stands before its statement, from 0 to 1.
        asked: the numbers of the pairs that the questions at the end ask for, in order.

    Raises:
        DataError: if statements and questions are longer than `length`, or there is no filler to fill it.
    """
    statements = [_worded(wording.statement, pair) for pair in pairs]
    questions = [_worded(wording.question, pairs[n]) for n in asked]
    size = length - sum(map(len, statements)) - sum(map(len, questions))
    if size < 0:
        raise DataError(
            f"a haystack of {length} tokens is too short for its {len(pairs)} statements and {len(asked)} questions, "
            f"which have {length - size}; choose a greater length"
        )
    if size and not len(filler_F):
        raise DataError(f"a haystack of {length} tokens needs {size} tokens of filler, and there are none; name a text")
    filler = np.resize(np.asarray(filler_F, dtype=np.int64), size)
    pieces: list[np.ndarray] = []
    starts, done, end = [0] * len(pairs), 0, 0
    for n in sorted(range(len(pairs)), key=lambda n: depths[n]):
        place = round(depths[n] * size)
        pieces += [filler[done:place], np.array(statements[n], dtype=np.int64)]
        starts[n] = end + place - done
        end, done = starts[n] + len(statements[n]), place
    pieces.append(filler[done:])
    end += size - done
    answers = []
    for n, ids in zip(asked, questions, strict=True):
        pieces.append(np.array(ids, dtype=np.int64))
        end += len(ids)
        stop = end - len(wording.question[2])
        answers.append((stop - len(pairs[n][1]), stop))
    return Haystack(tokens_N=np.concatenate(pieces), statements=tuple(starts), answers=tuple(answers))


def _worded(words: tuple[tuple[int, ...], ...], pair: Pair) -> tuple[int, ...]:
    """Return the key and the value with the words around them."""
    before, between, after = words
    key, value = pair
    return (*before, *key, *between, *value, *after)
