"""Frames between a receiver and the reducer: memory that both see, a few slots a stream, gone when both are.

An anonymous file (memfd) is mapped by both processes; its descriptor travels over their connection, so that nothing is
left behind by a server that is killed.
"""

import mmap
import os
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

import numpy as np

_BYTES = 8 << 20
"""The approximate bytes of a stream: enough for a few frames on their way."""


class Slots:
    """Room for a few frames of one length."""

    def __init__(self, values: int, count: int, fd: int | None = None):
        """Make room for `count` frames of `values` floats, or map the room that `fd` is. Takes over `fd`."""
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
        """One frame, float32 [values]."""
        return np.frombuffer(self._memory, np.float32, self.values, slot * self._stride)

    def send(self, connection: Connection, pid: int) -> None:
        """Hand the room to the process at the other end."""
        send_handle(connection, self.fd, pid)
        os.close(self.fd)

    @staticmethod
    def receive(connection: Connection, values: int, count: int) -> "Slots":
        """The room that the other end sends."""
        slots = Slots(values, count, recv_handle(connection))
        os.close(slots.fd)
        return slots
