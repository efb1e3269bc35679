"""The thread behind the step: tasks in order, errors told, an end that is waited for."""

import threading
import time
from typing import Any

import pytest
from steptron.worker import Worker


def test_tasks_are_done_in_order_in_one_other_thread() -> None:
    done: list[tuple[int, threading.Thread]] = []
    worker = Worker("behind", lambda error: True)
    for number in range(100):
        worker.put(lambda number=number: done.append((number, threading.current_thread())))
    assert worker.close(30)
    assert [number for number, _ in done] == list(range(100))
    assert {thread.name for _, thread in done} == {"behind"}
    assert len({thread for _, thread in done}) == 1


@pytest.mark.parametrize("continues", [True, False])
def test_an_error_is_told_and_decides_whether_the_rest_is_done(continues: bool) -> None:
    errors: list[Exception] = []
    done: list[str] = []

    def failed(error: Exception) -> bool:
        errors.append(error)
        return continues

    worker = Worker("behind", failed)
    worker.put(lambda: done.append("before"))
    worker.put(lambda: 1 // 0)  # pyright: ignore[reportArgumentType]
    worker.put(lambda: done.append("after"))
    assert worker.close(30)
    assert [type(error) for error in errors] == [ZeroDivisionError]
    assert done == ["before", "after"] if continues else ["before"]


def test_close_waits_no_longer_than_its_patience_and_drops_what_comes_later() -> None:
    release, done = threading.Event(), []
    worker = Worker("behind", lambda error: True)
    worker.put(lambda: release.wait(60) and None)
    worker.put(lambda: done.append("put in time"))
    assert not worker.close(0.05)
    assert not worker.close(0.05), "it has not ended since"
    worker.put(lambda: done.append("too late"))
    release.set()
    deadline = time.monotonic() + 30
    while any(thread.name == "behind" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done == ["put in time"]
    assert worker.close(0)


def test_first_tasks_of_two_threads_are_done_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A saver and the training loop both put rounds of the mirror, which all ranks must do in one order."""

    class SlowToMake(threading.Thread):
        def __init__(self, **options: Any) -> None:
            time.sleep(0.2)  # the others come meanwhile
            super().__init__(**options)

    done: list[threading.Thread] = []
    worker, together = Worker("behind", lambda error: True), threading.Barrier(4)

    def put() -> None:
        together.wait(30)
        worker.put(lambda: done.append(threading.current_thread()))

    putting = [threading.Thread(target=put) for _ in range(4)]
    monkeypatch.setattr(threading, "Thread", SlowToMake)
    for thread in putting:
        thread.start()
    for thread in putting:
        thread.join()
    assert worker.close(30)
    assert len(done) == 4
    assert len(set(done)) == 1


def test_a_worker_without_a_task_has_no_thread() -> None:
    worker = Worker("behind", lambda error: True)
    assert worker.close(0)
    assert all(thread.name != "behind" for thread in threading.enumerate())
