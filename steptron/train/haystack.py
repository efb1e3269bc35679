"""A needle-in-a-haystack sweep: does the network retrieve a value that was stated long before, by length and depth?

    statement, question ─ tokenizer ─► Wording ─┐
    text ─► filler ─────────────────────────────┴─► data/needle.py ─► documents ─ Scorer ─► Cell by length and depth

A document counts if each token of the value is the most probable one after those before it, so one forward pass tells.

Legend: F filler tokens.
"""

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from steptron.data.needle import Wording, draw_pairs, hide
from steptron.data.pack import TokenStream
from steptron.data.tokenizer import LoadedTokenizer
from steptron.errors import DataError
from steptron.train.scoring import Request, Scorer

STATEMENT = " The number of box {key:4} is {value:6}."
QUESTION = " Remember: the number of box {key:4} is {value:6}"
FILLER = (
    " The grass is green and the sky is blue. The sun rises in the east, and the day is long."
    " A river runs past the old house, and the road beside it leads to the sea."
)
"""The text between statements if there is no other."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The documents of a sweep."""

    lengths: Sequence[int]
    """Lengths of documents in tokens, the answer included."""
    depths: Sequence[float]
    """Percents of the filler that stand before the statement, from 0 to 100."""
    repeats: int
    """The number of documents of each length and depth."""
    pairs: int
    """The number of statements of a document. All but the one that is asked for stand at random depths."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class Form:
    """A wording in token ids, and what keys and values are made of."""

    wording: Wording
    alphabet: tuple[int, ...]
    """The ids of the ten digits."""
    key_tokens: int
    value_tokens: int


class Cell(NamedTuple):
    """The result of one length and depth."""

    length: int
    depth: float
    """In percent."""
    found: int
    """The number of documents whose value is retrieved."""
    repeats: int
    loss: float
    """The mean loss of a token of the value, in nats."""


def read_form(statement: str, question: str, used: LoadedTokenizer) -> Form:
    """Return the token ids of the wording. Each text has {key:N} and {value:N}, for N digits.

    Raises `DataError` if a text does not have this form, or the tokenizer has no token for each digit.
    """
    stated, asked = (_split(name, text) for name, text in (("statement", statement), ("question", question)))
    if stated[1:] != asked[1:]:
        raise DataError(f"--question {question!r} must have keys and values as long as those of {statement!r}")
    digits = tuple(used.encoder.encode(digit, add_special_tokens=False).ids[-1:] for digit in string.digits)
    alphabet = tuple(ids[0] for ids in digits if ids)
    if len(set(alphabet)) < 10:
        raise DataError(f"{used.path} does not have a token for each digit, of which keys and values are made")

    def encoded(parts: tuple[str, str, str]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        before, between, after = (tuple(used.encoder.encode(text, add_special_tokens=False).ids) for text in parts)
        return before, between, after

    wording = Wording(statement=encoded(stated[0]), question=encoded(asked[0]))
    return Form(wording=wording, alphabet=alphabet, key_tokens=stated[1], value_tokens=stated[2])


def read_filler(text: TokenStream | None, used: LoadedTokenizer, most: int) -> np.ndarray:
    """Return the first `most` tokens of a text, or of the built-in one, without the ends of its documents."""
    if text is None:
        return np.array(used.encoder.encode(FILLER, add_special_tokens=False).ids, dtype=np.int64)
    ids = np.empty(min(most, text.num_tokens), dtype=np.int64)
    text.read_into(0, ids)
    return ids[ids != used.eos_id]


def run_sweep(sweep: Sweep, form: Form, filler_F: np.ndarray, scorer: Scorer) -> list[Cell]:
    """Return the cells by length, then depth. Only rank 0 calls it, within `Scorer.run`."""
    cells = []
    for length in sweep.lengths:
        requests = list(documents(sweep, form, filler_F, length))
        scores = scorer.scores(requests)
        for d, depth in enumerate(sweep.depths):
            here = scores[d * sweep.repeats : (d + 1) * sweep.repeats]
            cells.append(
                Cell(
                    length=length,
                    depth=depth,
                    found=sum(score.greedy for score in here),
                    repeats=sweep.repeats,
                    loss=-sum(score.log_prob for score in here) / sweep.repeats / form.value_tokens,
                )
            )
    return cells


def documents(sweep: Sweep, form: Form, filler_F: np.ndarray, length: int) -> Iterator[Request]:
    """Yield the documents of a length. Each depends on the seed, its length, depth and number only."""
    for depth in sweep.depths:
        for repeat in range(sweep.repeats):
            random = np.random.default_rng([sweep.seed, length, round(depth * 1e4), repeat])
            pairs = draw_pairs(random, sweep.pairs, form.alphabet, form.key_tokens, form.value_tokens)
            depths = [depth / 100, *random.random(sweep.pairs - 1).tolist()]
            begun_F = np.roll(filler_F, -int(random.integers(max(1, len(filler_F)))))
            made = hide(length, begun_F, form.wording, pairs, depths, [0])
            ((start, stop),) = made.answers
            ids = made.tokens_N.tolist()
            yield Request(ids[:start], ids[start:stop])


def _split(name: str, text: str) -> tuple[tuple[str, str, str], int, int]:
    """Return the texts before, between and after key and value, and the digits of both."""
    try:
        parts = list(string.Formatter().parse(text))
        words, fields = [part[0] for part in parts], [part[1] for part in parts if part[1] is not None]
        sizes = [int(part[2] or "") for part in parts if part[1] is not None]
    except ValueError:
        words, fields, sizes = [], [], []
    if fields != ["key", "value"] or min(sizes) < 1:
        raise DataError(
            f"--{name} {text!r} must have {{key:N}} and then {{value:N}}, once each, with a number of digits N, as in "
            f"{STATEMENT!r}"
        )
    words += [""] * (3 - len(words))
    return (words[0], words[1], words[2]), sizes[0], sizes[1]
