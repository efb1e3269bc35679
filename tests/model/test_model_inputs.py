"""What a rank reads of its rows, against a walk over the tokens one by one."""

import pytest
import torch
from steptron.model.inputs import Inputs, Rows

T, HEADS = 8, 3
DOCUMENTS = [
    [0] * 11,
    [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3],
    [4, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1],  # numbers need not rise
]
TOKENS = [[100 * row + place for place in range(T + HEADS)] for row in range(len(DOCUMENTS))]
WEIGHTS = [[(0.0, 1.0, 0.25)[(row + place) % 3] for place in range(T + HEADS)] for row in range(len(DOCUMENTS))]
ROWS = Rows(
    tokens_BS=torch.tensor(TOKENS),
    documents_BS=torch.tensor(DOCUMENTS, dtype=torch.int32),
    weights_BS=torch.tensor(WEIGHTS),
    constants_KBS=torch.tensor([[[float(token) for token in row] for row in TOKENS]]),
)


def walked(row: int, head: int) -> list[tuple[int, float]]:
    """Targets of a head with their weights, token by token: 0 where the document that the token is in has ended
    before."""
    targets = []
    for place in range(T):
        there = place + head + 1
        same = DOCUMENTS[row][place] == DOCUMENTS[row][there]
        targets.append((TOKENS[row][there], WEIGHTS[row][there] if same else 0.0))
    return targets


@pytest.mark.parametrize("pieces", [None, ((0, 2), (6, 8)), ((2, 4), (4, 6))], ids=["whole", "outer", "inner"])
def test_each_head_reads_and_predicts_its_tokens(pieces):
    inputs = Inputs.from_rows(ROWS, T, pieces)
    places = [place for start, stop in pieces or ((0, T),) for place in range(start, stop)]
    for head in range(HEADS):
        for row in range(len(DOCUMENTS)):
            assert inputs.tokens_HBT[head, row].tolist() == [TOKENS[row][place + head] for place in places]
            found = zip(inputs.targets_HBT[head, row].tolist(), inputs.weights_HBT[head, row].tolist(), strict=True)
            assert list(found) == [walked(row, head)[place] for place in places]
    assert torch.equal(inputs.constants_KBT[0], inputs.targets_HBT[0].float()), "a constant belongs to its target"


def test_the_sum_of_weights_is_that_of_what_is_predicted():
    rows = range(len(DOCUMENTS))
    expected = [sum(weight for row in rows for _, weight in walked(row, head)) for head in range(HEADS)]
    assert ROWS.sum_weights(T).tolist() == expected
    assert ROWS.sum_weights(T).dtype is torch.float64


def test_rows_without_weights_predict_all_that_their_documents_have():
    rows = Rows.unweighted(ROWS.tokens_BS, ROWS.documents_BS)
    for head in range(HEADS):
        targets_BT, weights_BT = rows.targets(T, head)
        for row, document in enumerate(DOCUMENTS):
            same = [float(document[place] == document[place + head + 1]) for place in range(T)]
            assert weights_BT[row].tolist() == same
            assert targets_BT[row].tolist() == TOKENS[row][head + 1 : head + 1 + T]
    assert rows.constants_KBS.shape == (0, len(DOCUMENTS), T + HEADS)


def test_the_last_of_tokens_alone_has_no_target():
    inputs = Inputs.from_tokens(torch.tensor(TOKENS), ((0, 3), (8, 11)))
    places = [0, 1, 2, 8, 9, 10]
    assert inputs.tokens_HBT.tolist() == [[[row[place] for place in places] for row in TOKENS]]
    assert inputs.targets_HBT[0, :, :-1].tolist() == [[row[place + 1] for place in places[:-1]] for row in TOKENS]
    assert inputs.weights_HBT.tolist() == [[[1.0] * 5 + [0.0]] * len(TOKENS)]
    assert inputs.packing.positions_BT.tolist() == [places] * len(TOKENS)


def test_every_tensor_of_the_inputs_is_moved_and_named():
    inputs = Inputs.from_tokens(torch.zeros(1, 4, dtype=torch.int64))
    assert len(inputs.tensors()) == 7, "with a new tensor, look whether `to` moves it"
    assert all(values.is_meta for values in inputs.to("meta").tensors())
