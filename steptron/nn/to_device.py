"""Copies of host tensors on a device, for which the host does not wait."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Movable(Protocol):
    """A record of tensors."""

    def to(self, device: torch.device | str) -> Any:
        """Return a copy on `device`."""
        ...

    def tensors(self) -> Iterable[Tensor]:
        """Return its tensors."""
        ...


M = TypeVar("M", bound=Movable)


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Return the values on `device`.

    CUDA reads pageable memory only while the host waits for all that the stream was given before; from pinned memory it
    copies on its own. The pinned copy is reused after the stream has read it.
    """
    if torch.device(device).type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class CopyStream:
    """Copies records to a CUDA device on a stream of its own, beside what the device computes. Elsewhere it does
    nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, values: M) -> Callable[[], M]:
        """Start the copy. Return a function that lets the caller's stream wait for it, and returns it.

        Any thread may call this, and another one the function.
        """
        if self._stream is None:
            return lambda: values
        with torch.cuda.stream(self._stream):
            copied = values.to(self._device)
            done = self._stream.record_event()

        def arrived() -> M:
            here = torch.cuda.current_stream(self._device)
            done.wait(here)
            for tensor in copied.tensors():
                tensor.record_stream(here)  # the memory belongs to the other stream, and must outlive this one's work
            return copied

        return arrived
