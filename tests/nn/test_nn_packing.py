"""Packing against a loop over tokens."""

import pytest
import torch
from steptron.nn.packing import Packing


def by_loop(documents: list[list[int]]) -> tuple[list[list[int]], tuple[int, ...]]:
    positions, borders = [], []
    for r, row in enumerate(documents):
        positions.append([])
        for t, document in enumerate(row):
            new = t == 0 or row[t - 1] != document
            positions[-1].append(0 if new else positions[-1][-1] + 1)
            if new:
                borders.append(r * len(row) + t)
    return positions, (*borders, len(documents) * len(documents[0]))


@pytest.mark.parametrize(
    "documents",
    [
        pytest.param([[7, 7, 7, 7]], id="one document"),
        pytest.param([[0, 0, 1, 2, 2], [2, 2, 2, 3, 3]], id="a row's end is a border"),
        pytest.param([[5, 1, 5, 5]], id="an id comes back"),
        pytest.param([[0], [0], [0]], id="rows of one token"),
        pytest.param([[0, 1, 2, 3]], id="documents of one token"),
    ],
)
def test_borders_and_positions(documents):
    packing = Packing.from_documents(torch.tensor(documents, dtype=torch.int32))
    positions, borders = by_loop(documents)
    assert packing.positions_BT.tolist() == positions
    assert packing.cu_seqlens == borders
    assert packing.cu_seqlens_S.tolist() == list(borders)
    assert packing.cu_seqlens_S.dtype == torch.int32
    assert packing.longest == max(max(row) for row in positions) + 1


def test_pieces_of_rows_keep_the_borders_of_whole_rows():
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3, 3, 4]])
    whole, packing = Packing.from_documents(documents), Packing.from_documents(documents, ((2, 4), (6, 8)))
    assert packing.positions_BT.tolist() == [[2, 0, 0, 1], [2, 3, 6, 0]]
    assert packing.cu_seqlens == whole.cu_seqlens == (0, 3, 6, 8, 15, 16)
    assert (packing.rows, packing.row_length, packing.longest) == (2, 8, 7)
    assert whole.pieces == ((0, 8),)


def test_to_moves_every_tensor():
    packing = Packing.from_documents(torch.zeros(1, 4, dtype=torch.long)).to("meta")
    assert {t.device.type for t in vars(packing).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert packing.cu_seqlens == (0, 4)
