"""Frames that no server has confirmed, without one."""

import logging
import threading

import numpy as np
import pytest
from steptron.monitor.sinks import backlog
from steptron.monitor.sinks.backlog import Backlog

from waiting import wait_until


def _make(folder, rank: int = 0, writers: int = 1, buffer_mb: int = 8) -> Backlog:
    return Backlog(folder, rank, writers, {"of": rank}, f"identity{rank}", buffer_mb)


def _all(held: Backlog) -> list[tuple[int, int, bool, float]]:
    found, last = [], 0
    while (following := held.following(last)) is not None:
        last, one = following
        values = one.load()
        assert values is not None
        found.append((one.step, one.rank, one.late, float(values[0])))
    return found


def _values(step: int) -> np.ndarray:
    return np.full(100, step, np.float32)


def test_frames_keep_their_order_in_memory_and_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(backlog, "MEMORY_BYTES", 1000)
    held = _make(tmp_path)
    for step in range(1, 8):
        held.add(step, _values(step))
    wait_until(lambda: held._memory <= 1000)
    assert len(list(tmp_path.glob("rank-00000/*.npy"))) == 5
    assert _all(held) == [(step, 0, False, step) for step in range(1, 8)]
    for number in (1, 2, 3, 4, 7):
        held.confirm(number)
    assert [step for step, *_ in _all(held)] == [5, 6]
    assert len(list(tmp_path.glob("rank-00000/*.npy"))) == 2
    held.close()


def test_going_back_voids_later_steps(tmp_path):
    held = _make(tmp_path)
    for step in range(1, 6):
        held.add(step, _values(step))
    held.to_disk()
    held.add(6, _values(6))
    held.go_back(3)
    held.add(4, _values(44))
    assert _all(held) == [(1, 0, True, 1), (2, 0, True, 2), (3, 0, True, 3), (4, 0, False, 44)]
    assert len(list(tmp_path.glob("rank-00000/*.npy"))) == 3
    held.close()


@pytest.mark.parametrize("resumed", [None, 4, 0], ids=["a new run", "resumed at 4", "resumed at 0"])
def test_what_the_spool_holds_is_taken_over_up_to_the_resumed_step(tmp_path, resumed):
    for rank in range(4):
        held = _make(tmp_path, rank, 4)
        for step in range(3, 6):
            held.add(step, _values(10 * rank + step))
        held.close()
    (tmp_path / "rank-00002" / "00000004-identity2.npy").write_bytes(b"torn")
    held = _make(tmp_path, 0, 2)
    held.adopt(resumed)
    last, steps = 0, []
    while (following := held.following(last)) is not None:
        last, one = following
        steps.append((one.rank, one.step, one.late, one.load() is not None))
    kept = [(0, 3, True, True), (0, 4, True, True), (2, 3, True, True), (2, 4, True, False)]
    assert steps == (kept if resumed == 4 else [])
    assert set(held.registries) == {"identity0", "identity2"}
    assert len(list(tmp_path.glob("rank-0000[02]/*.npy"))) == len(steps)
    assert len(list(tmp_path.glob("rank-0000[13]/*.npy"))) == 6, "the other rank's to take"
    held.close()


def test_no_room_at_all_is_a_count_and_one_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "spool").write_text("a file where the folder should be, as good as a full disk")
    monkeypatch.setattr(backlog, "MEMORY_BYTES", 800)
    monkeypatch.setattr(backlog, "MAX_MEMORY_BYTES", 2000)
    with caplog.at_level(logging.WARNING):
        held = _make(tmp_path / "spool")
        for step in range(1, 30):
            held.add(step, _values(step))
        wait_until(lambda: held.dropped >= 27)
    assert [step for step, *_ in _all(held)] == [28, 29], "the oldest are dropped, as the warning says"
    assert held.dropped == 27
    assert len(caplog.records) == 1
    held.close()


def test_a_full_memory_drops_its_oldest_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(backlog, "MAX_MEMORY_BYTES", 2000)
    held = _make(tmp_path)
    for step in range(1, 10):
        held.add(step, _values(step))
    assert [step for step, *_ in _all(held)] == [5, 6, 7, 8, 9]
    assert held.dropped == 4
    held.close()


def test_a_full_spool_drops_its_oldest_frames(tmp_path):
    """A resumed run is then whole from some step on, rather than without its last ones."""
    held = _make(tmp_path, buffer_mb=1)
    for step in range(1, 7):
        held.add(step, np.full(1 << 16, step, np.float32))  # a quarter of a MiB
        held.to_disk()
    assert [step for step, *_ in _all(held)] == [3, 4, 5, 6]
    assert held.dropped == 2
    assert sorted(path.name[:8] for path in tmp_path.glob("rank-00000/*.npy")) == [
        f"{step:08d}" for step in range(3, 7)
    ]
    held.close()


def test_a_spool_that_fails_at_a_checkpoint_drops_nothing_that_memory_can_hold(tmp_path):
    (tmp_path / "spool").write_text("in the way")
    held = _make(tmp_path / "spool")
    held.add(1, _values(1))
    held.to_disk()
    assert (len(held), held.dropped) == (1, 0)
    held.close()
    assert (len(held), held.dropped) == (0, 1)


def test_two_threads_that_write_to_the_spool_take_turns(tmp_path, monkeypatch):
    held, inside, most = _make(tmp_path), [], []
    real = np.save

    def save(file, values):
        inside.append(file.name)
        most.append(len(inside))
        threading.Event().wait(0.002)
        real(file, values)
        inside.remove(file.name)

    monkeypatch.setattr(np, "save", save)
    for step in range(1, 31):
        held.add(step, _values(step))
    threads = [threading.Thread(target=held.to_disk) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (max(most), len(most)) == (1, 30), "each frame once, one at a time"
    assert held._disk == sum(path.stat().st_size - 128 for path in tmp_path.glob("*/*.npy")) == 30 * 400
    assert held._memory == 0
    held.close()
