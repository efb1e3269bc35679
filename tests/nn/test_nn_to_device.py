"""Copies to a device: pinned where CUDA reads them, plain elsewhere; on a stream of their own ahead of time."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from steptron.nn import to_device as module
from steptron.nn.to_device import CopyStream, to_device
from torch import Tensor


def test_without_cuda_it_is_a_plain_copy():
    values = torch.arange(5)
    assert to_device(values, "cpu") is values
    assert to_device(values, torch.device("meta")).is_meta


def test_a_copy_to_cuda_is_of_pinned_memory_and_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda values: asked.append("pin") or values)
    monkeypatch.setattr(Tensor, "to", lambda values, device, **options: asked.append((str(device), options)) or values)
    to_device(torch.arange(5), "cuda:1")
    assert asked == ["pin", ("cuda:1", {"non_blocking": True})]


class MadeUpCuda:
    """A device that notes what is asked of it, with the stream on which it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.current = "default"
        cuda = self

        class Stream:
            def __init__(self, device: torch.device) -> None:
                assert device == torch.device("cuda:1")

            def record_event(self) -> "Event":
                cuda.note("event")
                return Event()

        class Event:
            def wait(self, stream: str) -> None:
                cuda.note(f"{stream} waits for the event")

        self.Stream = Stream

    def note(self, what: str) -> None:
        self.asked.append((self.current, what))

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.current = "copies"
        yield
        self.current = "default"

    def current_stream(self, device: torch.device) -> str:
        return self.current


class Record:
    """A record of one tensor."""

    def __init__(self, cuda: MadeUpCuda) -> None:
        self.cuda = cuda

    def to(self, device: torch.device) -> "Record":
        self.cuda.note(f"copied to {device}")
        return self

    def tensors(self) -> list["Record"]:
        return [self]

    def record_stream(self, stream: str) -> None:
        self.cuda.note(f"kept for {stream}")


def test_a_record_is_copied_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch):
    cuda = MadeUpCuda()
    monkeypatch.setattr(module.torch, "cuda", cuda)
    values = Record(cuda)
    arrived = CopyStream(torch.device("cuda:1")).start(values)
    assert cuda.asked == [("copies", "copied to cuda:1"), ("copies", "event")], "nobody waits yet"
    assert arrived() is values
    assert cuda.asked[2:] == [("default", "default waits for the event"), ("default", "kept for default")]


def test_without_cuda_nothing_is_copied_ahead():
    values = Record(MadeUpCuda())
    assert CopyStream(torch.device("cpu")).start(values)() is values
    assert values.cuda.asked == []


def test_made_up_calls_are_those_of_torch():
    assert {"wait"} <= set(dir(torch.cuda.Event))
    assert {"record_event"} <= set(dir(torch.cuda.Stream))
    assert {"record_stream"} <= set(dir(Tensor))
