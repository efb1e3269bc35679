"""Two passes in turns: who runs when, how a pair ends, and who counts as at work."""

import sys
import threading
from collections.abc import Callable

import pytest
from steptron.parallel import turns as turns_module
from steptron.parallel import watchdog
from steptron.parallel.comm_timer import Clock
from steptron.parallel.turns import SecondPass, Turns


def program(turns: Turns, done: list[str], name: str, waits: int, fails: BaseException | None = None) -> Callable:
    """A pass with some exchanges, that notes what it does."""

    def run() -> None:
        for n in range(waits):
            done.append(f"{name}{n}")
            turns.started()
            turns.give()
        if fails is not None:
            raise fails
        done.append(f"{name} ends")

    return run


@pytest.mark.parametrize(
    ("waits", "order"),
    [
        ((2, 2), "f0 b0 f1 b1 f_ends b_ends"),
        ((1, 3), "f0 b0 f_ends b1 b2 b_ends"),
        ((3, 1), "f0 b0 f1 b_ends f2 f_ends"),
        ((0, 2), "f_ends b0 b1 b_ends"),
        ((2, 0), "f0 b_ends f1 f_ends"),
    ],
    ids=str,
)
def test_the_turn_passes_at_each_wait_until_one_ends(waits: tuple[int, int], order: str):
    turns, done = Turns(), []
    for _ in range(2):  # one pair after the other
        turns.run(program(turns, done, "f", waits[0]), program(turns, done, "b", waits[1]))
    assert [word.replace(" ", "_") for word in done] == order.split() * 2


def test_a_wait_for_what_started_before_the_last_turn_keeps_it():
    turns, done = Turns(), []

    def forward() -> None:
        turns.give()  # nothing has started
        for _ in range(2):
            turns.started()
        turns.give()
        done.append("forward")
        turns.give()  # the second of two exchanges that started together
        done.append("forward again")

    turns.run(forward, program(turns, done, "b", 1))
    assert done == ["b0", "forward", "forward again", "b ends"]


def test_outside_of_a_pair_nothing_waits():
    turns = Turns()
    turns.started()
    turns.give()


@pytest.mark.parametrize("failing", ["f", "b"])
@pytest.mark.parametrize("waits", [(0, 0), (1, 1), (2, 1), (1, 2)], ids=str)
def test_the_first_error_ends_both(failing: str, waits: tuple[int, int]):
    """The other pass stops where it waits, without a further collective."""
    turns, done = Turns(), []
    error = ValueError(failing)
    passes = [
        program(turns, done, name, n if name == failing else 9, error if name == failing else None)
        for name, n in zip("fb", waits, strict=True)
    ]
    with pytest.raises(ValueError, match=failing) as caught:
        turns.run(*passes)
    assert caught.value is error
    other = [word for word in done if word[0] != failing]
    assert len(other) <= waits["fb".index(failing)] + (failing == "b"), "the other one does not go on"
    done.clear()
    turns.run(program(turns, done, "f", 1), program(turns, done, "b", 1))
    assert done == ["f0", "b0", "f ends", "b ends"], "the next pair knows nothing of it"


def test_an_interrupt_while_the_other_pass_runs_stops_that_one():
    """A signal's handler raises in the main thread, wherever that waits."""
    turns, done = Turns(), []
    resume, wait = threading.Event(), turns_module._Pass.wait

    def interrupted(self) -> None:
        if threading.current_thread() is threading.main_thread() and not resume.is_set():
            resume.set()
            raise KeyboardInterrupt
        wait(self)

    def backward() -> None:
        assert resume.wait(60)
        program(turns, done, "b", 3)()

    turns_module._Pass.wait = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            turns.run(program(turns, done, "f", 3), backward)
    finally:
        turns_module._Pass.wait = wait
    assert done[0] == "f0"
    assert len([word for word in done if word[0] == "b"]) <= 1
    assert not any(isinstance(thread, SecondPass) for thread in threading.enumerate())


def test_a_wait_counts_in_both_passes():
    clock, turns = Clock(), Turns()
    ticks = iter(range(10))
    waited = clock.timed(lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: float(next(ticks)))
        turns.run(waited, waited)
        other = threading.Thread(target=waited)
        other.start()
        other.join()
    assert clock.take() == 2.0


def test_the_watchdog_looks_at_the_pass_that_runs():
    """The main thread waits for its turn, or for the end of the other pass, while that one computes."""
    turns, seen = Turns(), []

    def computes() -> None:
        seen.append(watchdog._where(sys._current_frames(), threading.main_thread().ident or 0))

    def forward() -> None:
        turns.started()
        turns.give()
        computes()

    def backward() -> None:
        computes()
        turns.started()
        turns.give()
        computes()

    turns.run(forward, backward)
    kinds, places = zip(*seen, strict=True)
    assert set(kinds) == {"busy"}
    assert [place.split(" (")[0] for place in places] == ["computes"] * 3
