"""Let two passes take turns on a rank, so that the exchange of one travels while the other computes.

    forward    ─ router, dispatch starts ┐                     ┌ experts, combine starts ┐
    backward                             └ …, gradients start ─┘                         └ experts, gradients start ─ …

Each pass has a thread, because autograd cannot be left in the middle of a backward pass. Exactly one of them runs at a
time. The turn passes where the running one has started an exchange and would wait for it, and nowhere else. So the
order depends on the program alone, and all ranks of a group start their collectives in the same order. If one pass
ends, the other one goes on alone.
"""

import threading
from collections.abc import Callable

import torch


class SecondPass(threading.Thread):
    """The thread of a backward pass beside a forward pass. The rank trains in it, as in the main thread."""


class _Stopped(Exception):
    """Ends a pass whose partner has failed. Nobody sees it, for the partner's error is raised."""


class _Pass:
    """One of two passes."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._turn.acquire()
        self.travels = False
        """True if the pass has started an exchange since it last let the other one run."""

    def wait(self) -> None:
        """Wait for this pass's turn."""
        self._turn.acquire()

    def go(self) -> None:
        """Give the turn to this pass."""
        self._turn.release()


class Turns:
    """Runs pairs of passes. Outside of a pair, its methods do nothing."""

    def __init__(self) -> None:
        self._running: _Pass | None = None
        self._waiting: _Pass | None = None
        self._error: BaseException | None = None

    def started(self) -> None:
        """Note that the running pass has started an exchange."""
        if self._running is not None:
            self._running.travels = True

    def give(self) -> None:
        """Let the other pass run until it waits for an exchange or ends. Call this before a wait for an exchange.

        Nothing happens if this pass has started none since the last call.
        """
        mine, other = self._running, self._waiting
        if mine is not None and other is not None and mine.travels:
            mine.travels = False
            self._running, self._waiting = other, mine
            other.go()
            self._wait(mine)
        if self._error is not None:
            raise _Stopped

    def run(self, forward: Callable[[], None], backward: Callable[[], None]) -> None:
        """Run both passes in turns, forward first. Raise the error of the one that fails first; the other one stops."""
        first, second = self._running, self._waiting = _Pass(), _Pass()
        end = _Pass()
        backward = _on_this_stream(backward)

        def run_second() -> None:
            second.wait()
            self._to_its_end(second, backward)
            end.go()

        thread = SecondPass(target=run_second, name="backward", daemon=True)
        thread.start()
        self._to_its_end(first, forward)
        self._wait(end)
        thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _wait(self, waiting: _Pass) -> None:
        """Wait for a turn. What a signal raises meanwhile is an error of this pass, but the other one still has to stop
        where the turn passes."""
        try:
            waiting.wait()
        except BaseException as error:
            self._error = self._error or error
            waiting.wait()

    def _to_its_end(self, mine: _Pass, action: Callable[[], None]) -> None:
        """Run a pass unless the other one has failed, keep its error, and give the turn away for good."""
        try:
            if self._error is None:
                action()
        except BaseException as error:
            self._error = self._error or error
        finally:
            assert self._running is mine, "a pass runs in its turn alone"
            self._running, self._waiting = self._waiting, None
            if self._running is not None:
                self._running.go()


def _on_this_stream(action: Callable[[], None]) -> Callable[[], None]:
    """Return the action for another thread, on the stream and the device of this one.

    Both belong to a thread. Gradients are on in every new thread, and autograd hands its state to its own threads.
    """
    if not torch.cuda.is_initialized():
        return action
    stream = torch.cuda.current_stream()

    def run() -> None:
        with torch.cuda.stream(stream):
            action()

    return run
