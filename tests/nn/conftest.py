"""Packed batches for the tests of the maths."""

from collections.abc import Callable

import pytest
import torch
from steptron.nn.packing import Packing

MakePacking = Callable[[int, int, str], Packing]


@pytest.fixture
def make_packing() -> MakePacking:
    """(rows, tokens a row, `one` | `few` | `tiny` documents a row) → packing, the same every time."""

    def make(rows: int, tokens: int, documents: str) -> Packing:
        generator = torch.Generator().manual_seed(rows * tokens)
        borders = {"one": 0, "few": 5, "tiny": tokens // 3}[documents]
        starts = torch.zeros(rows, tokens, dtype=torch.long)
        for row in starts:
            row[1 + torch.randperm(tokens - 1, generator=generator)[:borders]] = 1
        return Packing.from_documents(starts.cumsum(1))

    return make
