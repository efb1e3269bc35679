"""What a rank reads of its rows, against a walk over the tokens one by one."""

import pytest
import torch

from steptron.model.inputs import Inputs, count_targets

T, HEADS = 8, 3
DOCUMENTS = [
    [0] * 11,
    [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3],
    [4, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1],  # numbers need not rise
]
TOKENS = [[100 * row + place for place in range(T + HEADS)] for row in range(len(DOCUMENTS))]


def walked(row: int, head: int) -> list[int]:
    """Targets of a head, token by token: −100 where the document that the token is in has ended before."""
    targets = []
    for place in range(T):
        there = place + head + 1
        same = DOCUMENTS[row][place] == DOCUMENTS[row][there]
        targets.append(TOKENS[row][there] if same else -100)
    return targets


@pytest.mark.parametrize("pieces", [None, ((0, 2), (6, 8)), ((2, 4), (4, 6))], ids=["whole", "outer", "inner"])
def test_each_head_reads_and_predicts_its_tokens(pieces):
    inputs = Inputs.from_rows(torch.tensor(TOKENS), torch.tensor(DOCUMENTS, dtype=torch.int32), T, pieces)
    places = [place for start, stop in pieces or ((0, T),) for place in range(start, stop)]
    for head in range(HEADS):
        for row in range(len(DOCUMENTS)):
            assert inputs.tokens_HBT[head, row].tolist() == [TOKENS[row][place + head] for place in places]
            assert inputs.targets_HBT[head, row].tolist() == [walked(row, head)[place] for place in places]


def test_targets_are_counted_as_they_are_predicted():
    counts = count_targets(torch.tensor(DOCUMENTS, dtype=torch.int32), T)
    rows = range(len(DOCUMENTS))
    assert counts.tolist() == [sum(t >= 0 for row in rows for t in walked(row, head)) for head in range(HEADS)]
    assert counts.dtype is torch.int64
