"""Samples that are changed as soon as they are read, to give a run weights, documents or tokens of all kinds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
from steptron.data.loader import Loader
from steptron.data.pack import Concatenated


@dataclass(frozen=True)
class Drawn:
    """A sample. Its arrays may be written."""

    stage: str
    index: int
    source: str
    tokens_S: np.ndarray
    weights_S: np.ndarray


@contextmanager
def changed_samples(change: Callable[[Drawn], np.ndarray | None]) -> Iterator[None]:
    """Call `change` with each sample of all loaders. An array that it returns has the new lengths of the documents."""
    fill = Loader._fill

    def changed(
        self: Loader, stage: str, index: int, tokens_S: np.ndarray, weights_S: np.ndarray
    ) -> tuple[str, np.ndarray]:
        source, lengths = fill(self, stage, index, tokens_S, weights_S)
        others = change(Drawn(stage, index, source, tokens_S, weights_S))
        return source, lengths if others is None else others

    always = property(lambda self: True, lambda self, value: None)  # each batch has weights of its own
    with patch.object(Loader, "_fill", changed), patch.object(Concatenated, "weighted", always, create=True):
        yield
