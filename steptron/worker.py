"""A thread that does tasks behind the training step: checkpoints, their copies, metrics."""

import queue
import threading
from collections.abc import Callable


class Worker:
    """A thread that does tasks one after another, in the order in which they were put. It starts with the first one."""

    def __init__(self, name: str, failed: Callable[[Exception], bool]):
        """Make a worker without a thread.

        Args:
            name: the name of the thread.
            failed: called in the thread with what a task has raised. If it returns false, the tasks that follow are
                dropped.
        """
        self._name, self._failed = name, failed
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._closed = False

    def put(self, task: Callable[[], None]) -> None:
        """Give the thread one more task, and return at once. After `close` the task is dropped."""
        if self._closed:
            return
        with self._starting:  # two threads may bring the first task: two workers would lose the order
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._tasks.put(task)

    def close(self, patience_s: float) -> bool:
        """Wait until all tasks are done, but no longer than `patience_s`. Returns whether they are. Idempotent."""
        if not self._closed:
            self._closed = True
            self._tasks.put(None)
        if self._thread is None:
            return True
        self._thread.join(patience_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception as error:  # the thread has no other way to tell
                if not self._failed(error):
                    return
