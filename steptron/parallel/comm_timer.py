"""How long this rank waits for others: the time its main thread spends in the waits of collectives.

Meant for CPUs, where a wait holds the thread up. On CUDA a wait only orders streams, and what is counted is near zero.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed._functional_collectives as functional
from torch.distributed import Work


class Clock:
    """Adds up seconds of waiting."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._thread = threading.get_ident()
        # Waiting for an AsyncCollectiveTensor calls a second wait inside the first. Only the outer one counts.
        self._waits = False

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        """Return `wait`, counted where the thread that made the clock calls it, and once where waits are nested."""

        def timed_wait(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread or self._waits:
                return wait(*args, **kwargs)
            start, self._waits = time.perf_counter(), True
            try:
                return wait(*args, **kwargs)
            finally:
                self._seconds += time.perf_counter() - start
                self._waits = False

        return timed_wait


@contextmanager
def communication_clock() -> Iterator[Clock]:
    """Counts all waits inside of the block: of torch.distributed's own collectives, and of the functional ones that layers call."""
    clock = Clock()
    wait, wait_tensor = Work.wait, functional.wait_tensor
    Work.wait = clock.timed(wait)  # torch has no hook there for other back ends than NCCL
    functional.wait_tensor = clock.timed(wait_tensor)
    try:
        yield clock
    finally:
        Work.wait = wait
        functional.wait_tensor = wait_tensor
