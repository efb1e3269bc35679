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

CPU = torch.device("cpu")


@pytest.fixture
def alone(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, and a time that goes on by a second each time it is read."""
    ticks = iter(range(1000))
    monkeypatch.setattr(comm_timer, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_waits_of_own_and_functional_collectives_are_counted_once(alone):
    with communication_clock(CPU) as own:
        dist.all_reduce(torch.ones(2))
        assert own.take() == 1.0
        assert own.take() == 0.0, "taken"
        handle = dist.all_reduce(torch.ones(2), async_op=True)
        assert handle is not None
        handle.wait()
        functional.wait_tensor(functional.all_reduce(torch.ones(2), "sum", dist.group.WORLD))
        assert own.take() == 2.0
        dist.all_reduce(torch.ones(2))
        own.drop()
        assert own.take() == 0.0, "forgotten"


def test_another_threads_waits_are_not_counted(alone):
    with communication_clock(CPU) as own:
        other = threading.Thread(target=lambda: dist.all_reduce(torch.ones(2)))
        other.start()
        other.join()
        assert own.take() == 0.0


def test_nothing_is_left_behind(alone):
    before = dist.Work.wait, functional.wait_tensor
    with communication_clock(CPU):
        assert (dist.Work.wait, functional.wait_tensor) != before
    assert (dist.Work.wait, functional.wait_tensor) == before


class Device:
    """A made-up GPU: its streams by name, the current one, whether it is behind the host, and a time that grows by 250 ms
    with each event."""

    def __init__(self) -> None:
        device = self
        self.now, self.current, self.behind = 0.0, "default", False

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at: float | None = None

            def record(self) -> None:
                device.now += 250.0
                self.at = device.now

            def query(self) -> bool:
                return not device.behind

            def elapsed_time(self, end: "Event") -> float:
                assert self.at is not None
                assert end.at is not None
                return end.at - self.at

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def __eq__(self, other: object) -> bool:
                return isinstance(other, Stream) and other.name == self.name

            def wait_event(self, event: object) -> None:
                pass

        self.Event, self.Stream = Event, Stream

    def current_stream(self):
        return self.Stream(self.current)

    def default_stream(self):
        return self.Stream("default")


@pytest.fixture
def device(alone, monkeypatch: pytest.MonkeyPatch) -> Device:
    made_up = Device()
    monkeypatch.setattr(comm_timer.torch, "cuda", made_up)
    return made_up


def test_on_cuda_waits_count_when_the_device_has_reached_them(device: Device):
    with communication_clock(torch.device("cuda")) as own:
        for behind, seconds in ((False, 0.5), (True, 0.0), (False, 1.0)):
            dist.all_reduce(torch.ones(2))
            own.drop()
            device.behind = behind
            for _ in range(2):
                dist.all_reduce(torch.ones(2), async_op=True).wait()  # pyright: ignore[reportOptionalMemberAccess]
            assert own.take() == seconds, "the third step has those of the second one too"
        assert own.take() == 0.0
    assert device.Stream.wait_event.__name__ == "wait_event", "nothing is left behind"


def test_on_cuda_only_the_default_stream_counts(device: Device):
    with communication_clock(torch.device("cuda")) as own:
        device.Stream("default").wait_event(None)
        device.Stream("gathers").wait_event(None)
        device.current = "gathers"
        device.Stream("gathers").wait_event(None)
        device.Stream("default").wait_event(None)
        assert own.take() == 0.25


def test_on_cuda_backward_counts_on_a_thread_of_its_own(device: Device):
    with communication_clock(torch.device("cuda")) as own:
        other = threading.Thread(target=lambda: dist.all_reduce(torch.ones(2)))
        other.start()
        other.join()
        assert own.take() == 0.25
