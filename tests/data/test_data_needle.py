"""Needles in a haystack: where statements and answers are, and what is drawn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steptron.data.needle import Wording, draw_pairs, hide
from steptron.errors import DataError

WORDING = Wording(statement=((1001,), (1002,), (1003,)), question=((1004,), (1005,), (1006, 1007)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_document_holds_its_filler_its_statements_and_its_answers(data: st.DataObject) -> None:
    """Taking every statement and question out of the list leaves the filler, cut at the depths."""
    count = data.draw(st.integers(1, 4))
    depths = data.draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    asked = data.draw(st.lists(st.integers(0, count - 1), max_size=3))
    size = data.draw(st.integers(0, 50))
    pairs = draw_pairs(np.random.default_rng(size), count, range(500, 510), 2, 3)
    filler = list(range(data.draw(st.integers(1, 60))))
    made = hide(8 * count + 9 * len(asked) + size, np.array(filler), WORDING, pairs, depths, asked)
    ids = made.tokens_N.tolist()
    assert len(ids) == 8 * count + 9 * len(asked) + size
    rest = [token for token in ids if token < 500]
    assert rest == (filler * 60)[:size]
    for (key, value), start, depth in zip(pairs, made.statements, depths, strict=True):
        assert ids[start : start + 8] == [1001, *key, 1002, *value, 1003]
        assert sum(token < 500 for token in ids[:start]) == round(depth * size)
    for n, (start, stop) in zip(asked, made.answers, strict=True):
        assert tuple(ids[start:stop]) == pairs[n][1]
        assert ids[start - 4 : start] == [1004, *pairs[n][0], 1005]
        assert ids[stop : stop + 2] == [1006, 1007]


def test_keys_differ_and_a_seed_draws_the_same_pairs() -> None:
    pairs = draw_pairs(np.random.default_rng(3), 100, range(10), 2, 1)
    assert len({key for key, _ in pairs}) == 100
    assert pairs == draw_pairs(np.random.default_rng(3), 100, range(10), 2, 1)
    assert pairs != draw_pairs(np.random.default_rng(4), 100, range(10), 2, 1)
    with pytest.raises(DataError, match="10 tokens make 100 keys of length 2, fewer than the 101 pairs"):
        draw_pairs(np.random.default_rng(3), 101, range(10), 2, 1)


@pytest.mark.parametrize(
    ("length", "filler", "said"),
    [(16, 5, "is too short for its 1 statements and 1 questions, which have 17"), (18, 0, "needs 1 tokens of filler")],
    ids=["too short", "no filler"],
)
def test_a_document_that_cannot_be_made_is_refused(length: int, filler: int, said: str) -> None:
    pairs = draw_pairs(np.random.default_rng(0), 1, range(10), 2, 3)
    with pytest.raises(DataError, match=f"a haystack of {length} tokens {said}"):
        hide(length, np.arange(filler), WORDING, pairs, [0.5], [0])
    assert len(hide(17, np.arange(0), WORDING, pairs, [0.5], [0]).tokens_N) == 17
