"""metrics.jsonl: what goes in comes out, and a resumed run finds just its past."""

import errno
import json
import logging
import math
import os

import numpy as np
import pytest
from fake_run import make_recipe, make_steps
from steptron.monitor.sinks import metrics_jsonl
from steptron.monitor.sinks.metrics_jsonl import JsonlSink
from steptron.monitor.statistics.frame import Frame

from small_disks import fill, needs_root, small_disk


def _frame(step: int, **metrics) -> Frame:
    values = {"step": step, "stage": "base", **metrics}
    return Frame(step=step, metrics=values, tokens_by_source={"prose": 3}, plane=None)


def test_a_line_a_step_at_full_precision(tmp_path):
    rows = [metrics for metrics, _, _ in make_steps(make_recipe(tmp_path, 20))]
    sink = JsonlSink(tmp_path)
    for metrics in rows:
        sink.write(Frame(step=metrics["step"], metrics=metrics, tokens_by_source={"code": 7}, plane=None))
    # Not closed: every line is there as soon as it is written.
    read = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert read == [{**metrics, "tokens_by_source": {"code": 7}} for metrics in rows]
    sink.close()


def test_keys_keep_their_order(tmp_path):
    sink = JsonlSink(tmp_path)
    sink.write(_frame(1, tokens=5, loss=np.float64(0.1), mfu=None))
    sink.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert list(json.loads(line)) == ["step", "stage", "tokens", "loss", "mfu", "tokens_by_source"]


def test_a_loss_that_is_not_finite_is_kept(tmp_path):
    sink = JsonlSink(tmp_path)
    sink.write(_frame(1, loss=math.nan, grad_norm=math.inf))
    sink.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert math.isnan(row["loss"])
    assert row["grad_norm"] == math.inf


@pytest.mark.parametrize(
    "tail", ["", '{"step": 8, "loss": 1.', '{"step": 99, "loss": 1.5}'], ids=["whole", "torn", "no newline"]
)
@pytest.mark.parametrize("keep", [0, 3, 7, 9])
def test_truncation_keeps_earlier_lines_byte_for_byte(tmp_path, keep, tail):
    sink = JsonlSink(tmp_path)
    for step in range(1, 8):
        sink.write(_frame(step, loss=1 / step))
    sink.close()
    path = tmp_path / "metrics.jsonl"
    before = path.read_text().splitlines(keepends=True)
    path.write_text("".join(before) + tail)
    sink = JsonlSink(tmp_path)
    sink.truncate_after(keep)
    sink.write(_frame(keep + 1, loss=0.25))
    sink.close()
    after = path.read_text().splitlines(keepends=True)
    assert after[:-1] == before[:keep]
    assert json.loads(after[-1])["step"] == keep + 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 64) as disk:
        yield disk


def _steps(path) -> list[int]:
    """Of the file's lines, all of which are whole."""
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line)["step"] for line in text.splitlines()]


@needs_root
@pytest.mark.parametrize("room", [20_000, 10], ids=["all wait", "more than may wait"])
def test_lines_wait_until_a_full_disk_has_room(disk, monkeypatch, caplog, room):
    monkeypatch.setattr(metrics_jsonl, "MAX_WAITING", room)
    path, sink = disk / "metrics.jsonl", JsonlSink(disk)
    for step in range(1, 6):
        sink.write(_frame(step, loss=1 / step))
    filler = fill(disk)
    with caplog.at_level(logging.WARNING, "steptron"):
        for step in range(6, 101):
            sink.write(_frame(step, loss=1 / step))
            assert _steps(path) == list(range(1, 1 + len(_steps(path)))), "no half line stays"
        written = len(_steps(path))
        assert 5 <= written < 90, "the disk is full"
        dropped = max(0, 100 - written - room)
        sink.flush()
        filler.unlink()
        sink.write(_frame(101))
        sink.write(_frame(102))
    assert _steps(path) == [*range(1, written + 1), *range(written + dropped + 1, 103)]
    stops, lacks, goes_on = (record.getMessage() for record in caplog.records)
    assert f"{path} cannot be written: [Errno 28] No space left on device; training continues" in stops
    assert f"{path} has no line of steps {written + dropped + 1} to 100" in lacks
    assert goes_on.startswith(f"{path} is written again, and complete")
    assert (f"the {dropped} oldest lines" in goes_on) == (dropped > 0)
    sink.close()


@needs_root
def test_a_run_that_goes_back_while_the_disk_is_full_has_each_step_once(disk):
    path, sink = disk / "metrics.jsonl", JsonlSink(disk)
    for step in range(1, 11):
        sink.write(_frame(step, loss=1.0))
    filler = fill(disk)
    for step in range(11, 101):
        sink.write(_frame(step, loss=1.0))
    for back in (98, 8):
        sink.truncate_after(back)
        sink.write(_frame(back + 1, loss=2.0))
    filler.unlink()
    sink.write(_frame(10, loss=2.0))
    sink.close()
    assert [(row["step"], row["loss"]) for row in map(json.loads, path.read_text().splitlines())] == [
        (step, 1.0 if step < 9 else 2.0) for step in range(1, 11)
    ]
    assert sorted(entry.name for entry in disk.iterdir()) == ["metrics.jsonl"]


@needs_root
def test_what_never_got_room_is_said_at_the_end(disk, caplog):
    sink = JsonlSink(disk)
    fill(disk)
    for step in range(1, 100):
        sink.write(_frame(step))
    with caplog.at_level(logging.WARNING, "steptron"):
        sink.close()
    first = len(_steps(disk / "metrics.jsonl")) + 1 if (disk / "metrics.jsonl").stat().st_size else 1
    assert f"metrics.jsonl will never have a line of steps {first} to 99" in caplog.text


def test_half_a_line_of_a_crash_is_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    sink = JsonlSink(tmp_path)
    sink.write(_frame(2))
    sink.close()
    assert _steps(path) == [1, 2]


def test_lines_that_wait_for_room_are_forgotten_like_those_of_the_file(tmp_path, monkeypatch):
    def full(line: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sink = JsonlSink(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sink, "_append", full)
        for step in range(1, 6):
            sink.write(_frame(step, loss=1.0))
        sink.truncate_after(3)
    sink.write(_frame(4, loss=2.0))
    sink.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_a_checkpoint_has_every_line_before_it_on_the_disk(tmp_path, monkeypatch):
    """So that a run that goes on from it after a power cut has its past whole."""
    synced: list[int] = []
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    sink = JsonlSink(tmp_path)
    monkeypatch.setattr(metrics_jsonl.os, "fsync", sync)
    for step in range(1, 4):
        sink.write(_frame(step))
    assert synced == [], "a step does not wait for the disk"
    sink.flush()
    assert synced == [(tmp_path / "metrics.jsonl").stat().st_size]
    sink.close()


def test_a_long_file_is_read_no_further_than_it_is_cut(tmp_path, monkeypatch):
    sink = JsonlSink(tmp_path)
    for step in range(1, 2001):
        sink.write(_frame(step, loss=1 / step))
    sink.close()
    read: list[bytes] = []
    real = metrics_jsonl.jsonl.parse
    monkeypatch.setattr(metrics_jsonl.jsonl, "parse", lambda line: (read.append(line), real(line))[1])
    sink = JsonlSink(tmp_path)
    sink.truncate_after(1990)
    sink.close()
    assert len(read) == 11
    assert _steps(tmp_path / "metrics.jsonl") == list(range(1, 1991))
