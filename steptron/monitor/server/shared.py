"""Shared memory for frames between a receiver and the reducer: a few slots per stream.

Both processes map an anonymous file (memfd), whose descriptor is sent over their connection. So a server that is killed
leaves nothing behind.
"""

import mmap
import os
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

import numpy as np

_BYTES = 8 << 20
"""The approximate bytes of a stream's slots: enough for a few frames in transfer."""


class Slots:
    """Room for a few frames of one length."""

    def __init__(self, values: int, count: int, fd: int | None = None):
        """Allocate room for `count` frames of `values` floats, or map the memory behind `fd`.

        The object owns `fd` from then on.
        """
        self.values, self.count = values, count
        self.fd = os.memfd_create("steptron-frames") if fd is None else fd
        self._stride = -(-max(1, values) * 4 // mmap.PAGESIZE) * mmap.PAGESIZE
        if fd is None:
            os.ftruncate(self.fd, self._stride * count)
        self._memory = mmap.mmap(self.fd, self._stride * count)
        os.set_inheritable(self.fd, False)

    @staticmethod
    def fitting(values: int) -> "Slots":
        """Return as many slots as a stream of such frames needs."""
        return Slots(values, max(4, min(64, _BYTES // max(1, values * 4))))

    def view(self, slot: int) -> np.ndarray:
        """Return one frame, float32 [values]."""
        return np.frombuffer(self._memory, np.float32, self.values, slot * self._stride)

    def send(self, connection: Connection, pid: int) -> None:
        """Send the memory to the process at the other end."""
        send_handle(connection, self.fd, pid)
        os.close(self.fd)

    @staticmethod
    def receive(connection: Connection, values: int, count: int) -> "Slots":
        """Receive the memory that the other end sends."""
        slots = Slots(values, count, recv_handle(connection))
        os.close(slots.fd)
        return slots
