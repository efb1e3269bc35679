"""Measure the time that this rank spends waiting in collectives during a step.

On a CPU a wait blocks the thread that trains, and `Clock` measures how long. On CUDA a wait only lets the current
stream wait for that of the collective, so `EventClock` measures how long the stream stands still: between an event
before the wait and one behind it. Their time is read when the device has passed both, so that the host does not wait
for it.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.distributed import Work

from steptron.parallel.turns import SecondPass
from steptron.torch_internals import functional


class WaitClock(Protocol):
    """Sums up the seconds of waiting."""

    def drop(self) -> None:
        """Forget the waits since the last call of `drop` or `take`."""
        ...

    def take(self) -> float:
        """Return the seconds of waiting since the last call of `drop` or `take`.

        On CUDA, waits that the device has not reached yet count in the next call.
        """
        ...

    def timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        """Return `wait` with its time counted, once if waits are nested."""
        ...


class Clock:
    """Implements `WaitClock` for the thread that makes it and for the second passes of pairs.

    Only one of a pair runs at a time, so a wait in either holds the rank up.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._thread = threading.get_ident()
        # Waiting for an AsyncCollectiveTensor calls a second wait inside of the first. Only the outer one counts.
        self._waits = False

    def drop(self) -> None:
        """See `WaitClock`."""
        self._seconds = 0.0

    def take(self) -> float:
        """Return the seconds since the last call of `drop` or `take`."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        """Return `wait` with its time counted: on the threads that train, and only once if waits are nested."""

        def timed_wait(*args: Any, **kwargs: Any) -> Any:
            if not self._trains() or self._waits:
                return wait(*args, **kwargs)
            start, self._waits = time.perf_counter(), True
            try:
                return wait(*args, **kwargs)
            finally:
                self._seconds += time.perf_counter() - start
                self._waits = False

        return timed_wait

    def _trains(self) -> bool:
        return threading.get_ident() == self._thread or isinstance(threading.current_thread(), SecondPass)


class EventClock:
    """Implements `WaitClock` for the default stream, in all threads: backward runs on one of autograd's.

    Other streams wait for each other beside the computation, which costs nothing.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._ahead: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        """The waits of earlier calls of `take` that the device had not reached."""
        self._nested = threading.local()

    def drop(self) -> None:
        """See `WaitClock`."""
        self._pairs = []

    def take(self) -> float:
        """See `WaitClock`. The host has read the result of the step, so that only waits of its update can be ahead."""
        passed: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        ahead: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        for pair in self._ahead + self._pairs:
            (passed if pair[1].query() else ahead).append(pair)
        self._ahead, self._pairs = ahead, []
        return sum(before.elapsed_time(after) for before, after in passed) / 1000

    def timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        """Return `wait` between two events of the default stream."""

        def timed_wait(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._nested, "waits", False) or not _default_stream_waits(args):
                return wait(*args, **kwargs)
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._nested.waits = True
            before.record()
            try:
                return wait(*args, **kwargs)
            finally:
                after.record()
                self._pairs.append((before, after))
                self._nested.waits = False

        return timed_wait


def _default_stream_waits(args: tuple[Any, ...]) -> bool:
    """Return whether a wait with these arguments holds the default stream up. A method of a stream has it as first."""
    current = torch.cuda.current_stream()
    waiting = args[0] if args and isinstance(args[0], torch.cuda.Stream) else current
    return current == torch.cuda.default_stream() and waiting == current


@contextmanager
def communication_clock(device: torch.device) -> Iterator[WaitClock]:
    """Count all waits in the block: of torch.distributed's collectives, of the functional ones and, on CUDA, of the
    current stream for an event, as FSDP2 waits."""
    clock: WaitClock = EventClock() if device.type == "cuda" else Clock()
    places = [(Work, "wait"), (functional, "wait_tensor")]  # torch has a hook here only for NCCL
    if device.type == "cuda":
        places.append((torch.cuda.Stream, "wait_event"))
    original = [getattr(owner, name) for owner, name in places]
    for (owner, name), wait in zip(places, original, strict=True):
        setattr(owner, name, clock.timed(wait))
    try:
        yield clock
    finally:
        for (owner, name), wait in zip(places, original, strict=True):
            setattr(owner, name, wait)
