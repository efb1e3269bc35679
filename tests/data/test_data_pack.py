from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from steptron.data.pack import Concatenated, chunk_position, pieces


class Stream:
    """Tokens are their own positions; documents begin at `starts`."""

    def __init__(self, num_tokens: int, starts: tuple[int, ...] = (0,)) -> None:
        self.num_tokens = num_tokens
        self.documents = [sum(start <= position for start in starts) for position in range(num_tokens)]

    weighted = False

    def read_into(self, start: int, tokens: np.ndarray) -> np.ndarray:
        tokens[:] = range(start, start + len(tokens))
        return np.unique(self.documents[start : start + len(tokens)], return_counts=True)[1]

    def weights(self, start: int, stop: int, prefix: float) -> np.ndarray:
        return np.ones(stop - start, dtype=np.float32)


def sample(stream: Stream, ordinal: int, seq_len: int, lookahead: int, key: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a sample, and the document of each."""
    tokens, weights = np.full(seq_len + lookahead, -1), np.ones(seq_len + lookahead, dtype=np.float32)
    lengths = Concatenated(stream, seq_len, key).fill(ordinal, tokens, weights)
    assert (weights == 1).all()
    return tokens, np.repeat(np.arange(len(lengths)), lengths)


SIZES = {"num_tokens": st.integers(1, 400), "seq_len": st.integers(1, 90), "seed": st.integers(0, 1000)}


@given(**SIZES, epochs=st.integers(1, 4))
def test_every_epoch_serves_every_token_exactly_once(num_tokens: int, seq_len: int, seed: int, epochs: int) -> None:
    stream = Stream(num_tokens)
    num_samples = -(-epochs * num_tokens // seq_len)
    served: list[int] = []
    spilled: list[int] = []  # the last epoch's last sample goes on into the next one
    for ordinal in range(num_samples):
        tokens, _ = sample(stream, ordinal, seq_len, 0, (seed, "base", "code"))
        inside = epochs * num_tokens - chunk_position(ordinal, num_tokens, seq_len, (seed, "base", "code"))
        served += tokens[:inside].tolist()
        spilled += tokens[inside:].tolist() if inside < seq_len else []
    assert Counter(served) == Counter(dict.fromkeys(range(num_tokens), epochs))
    assert len(spilled) == num_samples * seq_len - epochs * num_tokens


@given(**SIZES)
def test_samples_of_one_epoch_come_before_those_of_the_next(num_tokens: int, seq_len: int, seed: int) -> None:
    epochs = [
        chunk_position(ordinal, num_tokens, seq_len, (seed,)) // num_tokens
        for ordinal in range(3 * num_tokens // seq_len)
    ]
    assert epochs == sorted(epochs)


@given(**SIZES, ordinal=st.integers(0, 50), lookahead=st.integers(1, 4), border=st.integers(0, 399))
def test_documents_and_lookahead_against_a_token_by_token_walk(
    num_tokens: int, seq_len: int, seed: int, ordinal: int, lookahead: int, border: int
) -> None:
    key, stream = (seed, "base", "code"), Stream(num_tokens, (0, border))
    tokens, documents = sample(stream, ordinal, seq_len, lookahead, key)
    position = chunk_position(ordinal, num_tokens, seq_len, key)
    assert len(tokens) == len(documents) == seq_len + lookahead
    document = 0
    for place in range(seq_len + lookahead):
        (token, _), *_ = pieces(position + place, 1, num_tokens, key)
        assert tokens[place] == token
        if place:
            is_new_epoch = (position + place) % num_tokens == 0
            document += is_new_epoch or token in (0, border)
        assert documents[place] == document


def test_grid_order_and_entry_differ_by_seed_stage_source_and_epoch() -> None:
    stream = Stream(6400)  # a multiple of the length, so that only the entry can move the grid
    orders = {
        key: [int(sample(stream, ordinal, 64, 1, key)[0][0]) for ordinal in range(100)]
        for key in [(1, "base", "code"), (2, "base", "code"), (1, "long", "code"), (1, "base", "prose")]
    }
    second_epoch = [int(sample(stream, 100 + ordinal, 64, 1, (1, "base", "code"))[0][0]) for ordinal in range(100)]
    grids = [{first % 64 for first in order} for order in [*orders.values(), second_epoch]]
    assert all(len(grid) == 1 for grid in grids)
    assert len(set.union(*grids)) == len(grids)
    assert all(order != sorted(order) for order in orders.values())


def test_the_order_of_chunks_differs_by_each_part_of_the_key_and_by_epoch() -> None:
    def order(key: tuple[str | int, ...], epoch: int) -> list[int]:
        return [chunk_position(100 * epoch + place, 6400, 64, key) - 6400 * epoch for place in range(100)]

    keys = [(1, "base", "code"), (2, "base", "code"), (1, "long", "code"), (1, "base", "prose")]
    orders = [*(order(key, 0) for key in keys), order(keys[0], 1)]
    assert all(sorted(one) == list(range(0, 6400, 64)) for one in orders)
    assert len(set(map(tuple, orders))) == len(orders)


@pytest.mark.parametrize("num_tokens", [1, 3, 64], ids=lambda tokens: f"{tokens} tokens")
def test_a_source_shorter_than_a_sample_is_repeated_with_borders(num_tokens: int) -> None:
    tokens, documents = sample(Stream(num_tokens), 5, 256, 2, ("k",))
    assert set(tokens.tolist()) == set(range(num_tokens))
    for place in range(1, len(tokens)):
        follows = tokens[place] == tokens[place - 1] + 1
        assert (documents[place] == documents[place - 1]) <= follows
