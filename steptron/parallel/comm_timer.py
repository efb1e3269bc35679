"""Measure the time that this rank's main thread spends waiting in collectives.

This is meant for CPUs, where a wait blocks the thread. On CUDA a wait only orders streams, and the measured time is
near zero.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed import Work

from steptron.torch_internals import functional


class Clock:
    """Sums up the seconds of waiting."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._thread = threading.get_ident()
        # Waiting for an AsyncCollectiveTensor calls a second wait inside of the first. Only the outer one counts.
        self._waits = False

    def take(self) -> float:
        """Return the seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        """Return `wait` with its time counted: on the clock's own thread, and only once if waits are nested."""

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
    """Count all waits in the block, both of torch.distributed's collectives and of the functional ones."""
    clock = Clock()
    wait, wait_tensor = Work.wait, functional.wait_tensor
    Work.wait = clock.timed(wait)  # torch has a hook here only for NCCL
    functional.wait_tensor = clock.timed(wait_tensor)
    try:
        yield clock
    finally:
        Work.wait = wait
        functional.wait_tensor = wait_tensor
