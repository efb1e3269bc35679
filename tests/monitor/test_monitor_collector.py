"""From a step's numbers, through a thread, to sinks: in order, without holding up training, whatever a sink does."""

import json
import logging
import threading

import numpy as np
import pytest
import torch
from fake_run import make_recipe, make_steps
from steptron.monitor.sinks.collector import Collector
from steptron.monitor.sinks.metrics_jsonl import JsonlSink
from steptron.monitor.statistics.frame import Alert, Frame
from steptron.monitor.statistics.host_copy import HostCopies

from waiting import PATIENCE_S

CPU = torch.device("cpu")
ALERT = Alert(step=3, title="loss_spike", text="too much", severe=False)


class Kept:
    """A sink that remembers what it was told, and waits or fails where it is to."""

    def __init__(self, fail: BaseException | None = None, gate: threading.Event | None = None):
        self.told, self._fail, self._gate = [], fail, gate
        self.fail_at: dict[int, Exception] = {}

    def write(self, frame: Frame) -> None:
        if self._gate is not None:
            self._gate.wait(PATIENCE_S)
        if (fail := self.fail_at.get(frame.step, self._fail)) is not None:
            raise fail
        self.told.append((frame.step, None if frame.plane is None else frame.plane.tolist()))

    def alert(self, alert: Alert) -> None:
        self.told.append(alert.title)

    def flush(self) -> None:
        self.told.append("flush")

    def truncate_after(self, step: int) -> None:
        self.told.append(f"truncate after {step}")

    def close(self) -> None:
        self.told.append("close")


def _steps_in(run_dir) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_all_is_told_in_order_and_planes_are_as_they_were_when_sent():
    sink, outbox, values = Kept(), HostCopies(3, CPU), torch.zeros(3)
    with Collector({"kept": lambda: sink}, resumed=7) as collector:
        for step in (8, 9):
            values.fill_(step)
            collector.step({"step": step}, {}, outbox.send(values))
        values.fill_(-1)
        collector.alert(ALERT)
        collector.flush()
        assert sink.told[-1] == "flush", "flush returns when all is done"
        collector.truncate_after(8)
    assert sink.told == [
        "truncate after 7",
        (8, [8.0] * 3),
        (9, [9.0] * 3),
        "loss_spike",
        "flush",
        "truncate after 8",
        "close",
    ]


def test_training_never_waits_and_what_finds_no_room_is_counted():
    gate, outbox = threading.Event(), HostCopies(4, CPU, depth=2)
    sink = Kept(gate=gate)
    with Collector({"slow": lambda: sink}) as collector:
        for step in range(1, 11):
            collector.step({"step": step}, {}, outbox.send(torch.ones(4)))
        assert sink.told == [], "all steps were handed over before the sink took the first"
        gate.set()
    assert [step for step, _ in sink.told[:-1]] == list(range(1, 11)), "scalars of every step arrive"
    assert sum(plane is not None for _, plane in sink.told[:-1]) == 10 - outbox.dropped
    assert 7 <= outbox.dropped <= 8, "two buffers, and one more that the thread may have taken already"


def _tell(sinks: dict[str, Kept], steps: int = 5) -> None:
    with Collector({name: lambda sink=sink: sink for name, sink in sinks.items()}, resumed=0) as collector:
        for step in range(1, steps + 1):
            collector.step({"step": step}, {}, None)
        collector.alert(ALERT)


def test_a_sink_that_cannot_write_is_warned_of_once_and_the_others_go_on(caplog):
    full, whole = Kept(fail=OSError(28, "No space left on device")), Kept()
    with caplog.at_level(logging.WARNING, "steptron"):
        _tell({"full": full, "whole": whole})
    assert [record.getMessage() for record in caplog.records] == [
        "full stopped: [Errno 28] No space left on device; training continues without it"
    ]
    assert full.told == ["truncate after 0"], "it is not even closed"
    assert [step for step, _ in whole.told[1:6]] == [1, 2, 3, 4, 5]
    assert whole.told[6:] == ["loss_spike", "close"]


@pytest.mark.parametrize(("bad", "lost"), [({3}, ""), ({2, 3, 5}, "sick has lost 3 frames to errors")])
def test_a_bug_costs_the_frames_that_meet_it(caplog, bad, lost):
    sick = Kept()
    sick.fail_at = dict.fromkeys(bad, ValueError("a bug"))
    with caplog.at_level(logging.WARNING, "steptron"):
        _tell({"sick": sick})
    said = [record.getMessage() for record in caplog.records]
    assert said == ["sick has lost a frame: ValueError('a bug'); it continues with the next"] + ([lost] if lost else [])
    assert caplog.records[0].exc_info, "the log's file has the traceback"
    assert [step for step, _ in sick.told[1:-2]] == sorted({1, 2, 3, 4, 5} - bad)
    assert sick.told[-2:] == ["loss_spike", "close"]


def test_a_sink_that_cannot_forget_steps_is_left_out_for_a_bug_too(caplog):
    class Stubborn(Kept):
        def truncate_after(self, step: int) -> None:
            raise ValueError("a bug")

    stubborn = Stubborn()
    with caplog.at_level(logging.WARNING, "steptron"):
        _tell({"stubborn": stubborn})
    assert "stubborn stopped: a bug; training continues without it" in caplog.text
    assert stubborn.told == [], "its steps would be there twice"


def test_metrics_jsonl_goes_on_after_a_frame_that_cannot_be_written(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "steptron"), Collector({"jsonl": lambda: JsonlSink(tmp_path)}) as collector:
        for step in range(1, 6):
            collector.step({"step": step, "odd": object() if step == 3 else 1.0}, {}, None)
    assert _steps_in(tmp_path) == [1, 2, 4, 5]
    assert "jsonl has lost a frame" in caplog.text


def test_a_sink_that_cannot_be_opened_is_left_out(caplog):
    def refuse() -> Kept:
        raise PermissionError(13, "Permission denied")

    kept = Kept()
    with caplog.at_level(logging.WARNING, "steptron"), Collector({"shut": refuse, "kept": lambda: kept}) as collector:
        collector.step({"step": 1}, {}, None)
    assert "shut cannot be written" in caplog.text
    assert kept.told[0] == (1, None)


def test_resume_leaves_no_trace_of_the_steps_done_again(tmp_path):
    """A run that was killed after step 17 and goes on from a checkpoint at 12 writes what an undisturbed one does."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    steps = [(metrics, sources) for metrics, _, sources in make_steps(make_recipe(tmp_path, 30))]

    def write(name: str, chosen: list, resumed: int | None = None) -> None:
        with Collector({"jsonl": lambda: JsonlSink(tmp_path / name)}, resumed) as collector:
            for metrics, sources in chosen:
                collector.step(metrics, sources, None)

    write("whole", steps)
    write("killed", steps[:17])
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 18, "stage": "lo')
    write("killed", steps[12:], resumed=12)
    whole, killed = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed"))
    assert killed == whole
    assert _steps_in(tmp_path / "whole") == list(range(1, 31))


def test_an_outbox_hands_out_copies_of_its_own():
    outbox = HostCopies(5, CPU, depth=1)
    first = outbox.send(torch.arange(5.0))
    assert outbox.send(torch.zeros(5)) is None
    assert first is not None
    values = first.unpack()
    second = outbox.send(torch.full((5,), 9.0))
    assert second is not None
    np.testing.assert_array_equal(values, np.arange(5.0))
    np.testing.assert_array_equal(second.unpack(), np.full(5, 9.0))
