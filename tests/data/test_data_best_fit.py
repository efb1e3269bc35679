"""Best-fit packing against naive references: whole documents, every token once an epoch, any sample at any time."""

from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steptron.data.best_fit import BestFit, best_fit, pieces_between


class Stream:
    """Documents of these lengths; a token is its own position."""

    def __init__(self, lengths: list[int]) -> None:
        self.all = [0, *np.cumsum(lengths).tolist()]
        self.num_tokens, self.num_documents = self.all[-1], len(lengths)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop)

    def check(self, tokens: np.ndarray) -> None:
        assert (np.diff(tokens) != 0).all(), "padding is no token of the stream"

    weighted = True

    def weights(self, start: int, stop: int, prefix: float) -> np.ndarray:
        return np.ones(stop - start, dtype=np.float32)

    def borders(self, start: int, stop: int) -> np.ndarray:
        kept = [(a, b) for a, b in pairwise(self.all) if a < stop and b > start]
        return np.array([kept[0][0], *(b for _, b in kept)])


def sample(packing: BestFit, ordinal: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tokens of a sample, and the document and the weight of each."""
    tokens, weights = np.full(size, -1), np.ones(size, dtype=np.float32)
    lengths = packing.fill(ordinal, tokens, weights)
    return tokens, np.repeat(np.arange(len(lengths)), lengths), weights


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=400)
LONG = st.lists(st.one_of(st.integers(1, 12), st.integers(30, 300)), min_size=1, max_size=120)


@settings(max_examples=40)
@given(lengths=st.one_of(LENGTHS, LONG), seq_len=st.integers(8, 48), seed=st.integers(0, 99), epoch=st.integers(0, 2))
def test_every_epoch_serves_every_token_once_and_the_rest_is_padding(lengths, seq_len, seed, epoch) -> None:
    packing = BestFit(Stream(lengths), seq_len, (seed, "base", "code"))
    served, real = Counter(), 0
    for ordinal in range(epoch * packing.num_samples, (epoch + 1) * packing.num_samples):
        tokens, documents, weights = sample(packing, ordinal, seq_len + 2)
        assert len(tokens) == len(documents) == len(weights) == seq_len + 2
        pieces = packing.pieces(ordinal)
        length = sum(piece.stop - piece.start for piece in pieces)
        assert 0 < length <= seq_len, "no row without a document"
        served.update(tokens[:length].tolist())
        real += length
        assert weights[:length].all()
        assert not weights[max(length, seq_len if pieces[-1].stop < pieces[-1].end else length) + 2 :].any()
        assert set(documents[:length].tolist()) == set(range(len(pieces)))
    assert served == Counter(dict.fromkeys(range(sum(lengths)), 1))
    assert packing.waste == pytest.approx(1 - real / (packing.num_samples * seq_len))
    assert packing.epoch_tokens == packing.num_samples * seq_len


def test_no_document_that_fits_is_cut_and_little_is_wasted() -> None:
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(4, 1, 30_000)).astype(int).tolist()
    stream = Stream([])
    stream.all = [0, *np.cumsum(lengths).tolist()]
    stream.num_tokens, stream.num_documents = stream.all[-1], len(lengths)
    starts = np.array(stream.all)
    stream.borders = (
        lambda start, stop: starts[  # the same as above, by bisection
            np.searchsorted(starts, start, "right") - 1 : np.searchsorted(starts, stop) + 1
        ]
    )
    packing = BestFit(stream, 1024, (1, "base", "code"))
    whole = set(pairwise(stream.all))
    for ordinal in range(packing.num_samples):
        for start, stop, end in packing.pieces(ordinal):
            if stop - start < 1024 and (start, stop) not in whole:  # the last piece of a document longer than a row
                first = stream.all[np.searchsorted(starts, start, "right") - 1]
                assert (start - first) % 1024 == 0
                assert stop == end
    assert 0 < packing.waste < 0.035


def test_a_row_that_a_long_document_fills_has_its_next_tokens_as_targets() -> None:
    packing = BestFit(Stream([100]), 10, ("k",))
    for ordinal in range(packing.num_samples):
        tokens, documents, weights = sample(packing, ordinal, 13)
        start = int(tokens[0])
        real = min(13, 100 - start)
        assert tokens[:real].tolist() == list(range(start, start + real))
        assert (documents[:real] == 0).all()
        assert weights.tolist() == [1.0] * real + [0.0] * (13 - real)


@given(lengths=LENGTHS, seed=st.integers(0, 9))
@settings(max_examples=20)
def test_any_sample_at_any_time_is_the_same(lengths, seed) -> None:
    one = BestFit(Stream(lengths), 40, (seed, "base", "code"))
    samples = [one.pieces(ordinal) for ordinal in range(2 * one.num_samples)]
    for ordinal in range(2 * one.num_samples - 1, -1, -7):
        assert BestFit(Stream(lengths), 40, (seed, "base", "code")).pieces(ordinal) == samples[ordinal]


def test_the_order_differs_by_key_and_epoch() -> None:
    def order(key: tuple, epoch: int) -> list:
        packing = BestFit(Stream([7] * 900), 16, key)
        return [packing.pieces(epoch * packing.num_samples + n) for n in range(packing.num_samples)]

    orders = [order((1, "base"), 0), order((2, "base"), 0), order((1, "long"), 0), order((1, "base"), 1)]
    assert len({str(sorted(chain(*one))) for one in orders}) == 1
    assert len({str(one) for one in orders}) == len(orders)


@given(lengths=st.lists(st.integers(1, 30), max_size=60), most=st.integers(1, 60))
def test_best_fit_is_what_a_naive_search_finds(lengths, most) -> None:
    rooms: list[int] = []
    held: list[list[int]] = []
    without = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        fitting = [n for n, room in enumerate(rooms) if room >= lengths[place]]
        if fitting:
            tightest = min(rooms[n] for n in fitting)
            # Among bins with equal room any is a best fit: the naive search takes the one that was asked for.
            chosen = [n for n in fitting if rooms[n] == tightest]
        elif len(rooms) < most:
            rooms.append(30)
            held.append([])
            chosen = [len(rooms) - 1]
        else:
            without.append(place)
            continue
        rooms[chosen[0]] -= lengths[place]
        held[chosen[0]].append(place)
    bins, left = best_fit(np.array(lengths, dtype=np.int64), 30, most)
    assert left == without
    assert sorted(sum(lengths[p] for p in one) for one in bins) == sorted(30 - room for room in rooms)
    assert sorted(chain(*bins)) == sorted(set(range(len(lengths))) - set(left))


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), longest=st.integers(1, 30), data=st.data())
def test_pieces_of_neighbouring_ranges_are_all_pieces(lengths, longest, data) -> None:
    stream = Stream(lengths)
    middle = data.draw(st.integers(1, stream.num_tokens))
    wanted = [
        (start, min(start + longest, end), end)
        for first, end in pairwise(stream.all)
        for start in range(first, end, longest)
    ]
    found = pieces_between(stream.borders(0, middle), 0, middle, longest).tolist()
    if middle < stream.num_tokens:
        rest = stream.borders(middle, stream.num_tokens)
        found += pieces_between(rest, middle, stream.num_tokens, longest).tolist()
    assert [tuple(piece) for piece in found] == wanted


@given(lengths=st.lists(st.integers(1, 15), max_size=300), most=st.integers(1, 9))
def test_short_documents_fill_the_rooms_and_waste_little(lengths, most) -> None:
    """All are shorter than 1/64 of a bin."""
    bins, left = best_fit(np.array(lengths, dtype=np.int64), 1000, most)
    assert sorted([*chain(*bins), *left]) == list(range(len(lengths)))
    filled = [sum(lengths[place] for place in one) for one in bins]
    assert all(985 < tokens <= 1000 for tokens in filled[:-1])
    assert not left or filled[-1] > 985


def test_documents_that_leave_half_a_row_free_are_not_cut_either() -> None:
    """The number of bins is found from the source: of documents of 0.51 rows each has a row of its own."""
    packing = BestFit(Stream([51] * 1000), 100, ("k",))
    assert all(len(packing.pieces(ordinal)) == 1 for ordinal in range(packing.num_samples))
    assert packing.waste == pytest.approx(0.5, abs=0.03)
