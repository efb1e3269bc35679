from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from steptron.data.permute import number, permute

KEYS = st.integers(0, 2**64 - 1)


@given(size=st.integers(1, 1500), key=KEYS)
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@given(size=st.integers(2**40, 2**60), key=KEYS, start=st.integers(0, 2**39))
def test_permute_of_a_huge_range_stays_in_it_without_repeats(size: int, key: int, start: int) -> None:
    values = [permute(start + index, size, key) for index in range(50)]
    assert len(set(values)) == 50
    assert all(0 <= value < size for value in values)


def test_permute_mixes() -> None:
    # In a random order a twentieth of neighbours is no nearer than by chance, and the mean distance is size / 3.
    size = 10_000
    order = [permute(index, size, number("a")) for index in range(size)]
    distances = [abs(one - two) for one, two in pairwise(order)]
    assert abs(sum(distances) / len(distances) - size / 3) < size / 50
    other = [permute(index, size, number("b")) for index in range(size)]
    assert sum(one == two for one, two in zip(order, other, strict=True)) < 20


def test_number_tells_parts_of_the_key_apart() -> None:
    keys = [("a", "b"), ("ab",), ("a", "b", 0), ("b", "a"), ("a", "b", 1)]
    assert len({number(*key) for key in keys}) == len(keys)
    assert number("a", 1) == number("a", 1)
