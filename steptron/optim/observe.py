"""Observation of an optimizer's step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class UpdateObserver(Protocol):
    """An observer of every step of the optimizer it is attached to."""

    def updated(self, name: str, change: Tensor, scale: float) -> None:
        """Record that this rank's part of a parameter changed by ±`scale` · `change`.

        A stack may come in several pieces.
        """
        ...

    def orthogonalised(self, names: Sequence[str], y_MRC: Float[Tensor, "M R C"]) -> None:
        """Record complete matrices that Muon has made orthogonal on this rank, and the parameter of each."""
        ...


@contextmanager
def watched(observer: UpdateObserver, name: str, piece: Tensor) -> Iterator[None]:
    """Show the observer how `piece` changes inside the block, at the cost of a copy."""
    before = piece.clone()
    yield
    observer.updated(name, torch.sub(piece, before, out=before), 1.0)
