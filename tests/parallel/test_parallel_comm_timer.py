"""The clock counts each wait of the thread that made it, and of no other."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from steptron.parallel import comm_timer
from steptron.parallel.comm_timer import communication_clock


@pytest.fixture
def alone(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, and a time that goes on by a second each time it is read."""
    ticks = iter(range(1000))
    monkeypatch.setattr(comm_timer, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_waits_of_own_and_functional_collectives_are_counted_once(alone):
    with communication_clock() as own:
        dist.all_reduce(torch.ones(2))
        assert own.take() == 1.0
        assert own.take() == 0.0, "taken"
        handle = dist.all_reduce(torch.ones(2), async_op=True)
        assert handle is not None
        handle.wait()
        functional.wait_tensor(functional.all_reduce(torch.ones(2), "sum", dist.group.WORLD))
        assert own.take() == 2.0


def test_another_threads_waits_are_not_counted(alone):
    with communication_clock() as own:
        other = threading.Thread(target=lambda: dist.all_reduce(torch.ones(2)))
        other.start()
        other.join()
        assert own.take() == 0.0


def test_nothing_is_left_behind(alone):
    before = dist.Work.wait, functional.wait_tensor
    with communication_clock():
        assert (dist.Work.wait, functional.wait_tensor) != before
    assert (dist.Work.wait, functional.wait_tensor) == before
