"""The ends of messages that name what is near."""

import pytest
from steptron.errors import nearest, nearest_numbers


def test_nearest_lists_everything_if_nothing_is_near() -> None:
    assert nearest("pros", ["prose", "code"]) == "nearest: prose"
    assert nearest("zzz", ["prose", "code"]) == "known: prose, code"
    assert nearest("zzz", []) == "there is none"


@pytest.mark.parametrize(
    ("value", "legal", "end"),
    [
        pytest.param(5, [1, 2, 4, 8], "nearest: 4, 8", id="both-sides"),
        pytest.param(5, [8, 6, 1], "nearest: 1, 6", id="any-order"),
        pytest.param(9, [1, 2], "nearest: 2", id="below"),
        pytest.param(0, [1, 2], "nearest: 1", id="above"),
        pytest.param(4, [4], "there is no legal value", id="none"),
        pytest.param(0.05, [2 / 48, 4 / 48], f"nearest: {2 / 48}, {4 / 48}", id="floats-in-full"),
    ],
)
def test_the_legal_numbers_next_to_a_value(value: float, legal: list[float], end: str) -> None:
    assert nearest_numbers(value, legal) == end
