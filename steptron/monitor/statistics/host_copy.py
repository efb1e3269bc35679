"""Copies of planes from the device to the host, while training continues.

    values on the device ─ asynchronous copy ─► one of a few host buffers (pinned for CUDA) ─ writer waits ─► NumPy

Training never waits here: if all buffers are in use, the plane of that step is dropped, and counted.
"""

import queue

import numpy as np
import torch
from torch import Tensor


class PendingCopy:
    """A plane in a host buffer."""

    def __init__(self, home: "queue.SimpleQueue[Tensor]", buffer: Tensor, arrived: "torch.cuda.Event | None"):
        self._home, self._buffer, self._arrived = home, buffer, arrived

    def unpack(self) -> np.ndarray:
        """Return the values, float32 [slots], as an array of the caller's own, and free the buffer. Call it once."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values = self._buffer.numpy().copy()
        self._home.put(self._buffer)
        return values


class HostCopies:
    """Host buffers for planes of one length."""

    def __init__(self, slots: int, device: torch.device, depth: int = 4):
        self._on_cuda = device.type == "cuda"
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for _ in range(depth):
            self._free.put(torch.empty(slots, dtype=torch.float32, pin_memory=self._on_cuda))
        self.dropped = 0
        """The number of planes that were dropped for lack of a buffer."""

    def send(self, values: Tensor) -> PendingCopy | None:
        """Start a copy of `values`, which may be overwritten afterwards; return None if the plane was dropped."""
        try:
            buffer = self._free.get_nowait()
        except queue.Empty:
            self.dropped += 1
            return None
        buffer.copy_(values, non_blocking=True)
        arrived = None
        if self._on_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        return PendingCopy(self._free, buffer, arrived)
