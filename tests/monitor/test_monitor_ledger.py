"""ledger.jsonl: decisions in order, through crashes."""

import dataclasses
import json
import logging
import math
import os
import resource
from datetime import UTC, datetime

import numpy as np
from fake_run import make_recipe
from steptron.monitor.storage import ledger
from steptron.monitor.storage.ledger import Judged, Ledger


def test_events_carry_time_step_and_evidence(tmp_path):
    stage = make_recipe(tmp_path).stages["base"]
    before = datetime.now(UTC).replace(microsecond=0)
    Ledger(tmp_path).write("stage_start", 12, stage="base", settings=stage)
    after = datetime.now(UTC)
    (line,) = (tmp_path / "ledger.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert list(event) == ["time", "event", "step", "stage", "settings"]
    assert (event["event"], event["step"], event["stage"]) == ("stage_start", 12, "base")
    assert event["settings"] == json.loads(json.dumps(dataclasses.asdict(stage)))
    assert before <= datetime.fromisoformat(event["time"]) <= after


def test_each_event_is_synced_to_the_disk(tmp_path, monkeypatch):
    sizes = []
    path = tmp_path / "ledger.jsonl"
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (sizes.append(path.stat().st_size), real(fd)))
    book = Ledger(tmp_path)
    book.write("run_start", 0)
    first = path.stat().st_size
    book.write("run_end", 1)
    assert sizes == [first, first, path.stat().st_size], "the file, the folder with its name, the file"


def test_a_resumed_run_appends_after_a_torn_line(tmp_path):
    Ledger(tmp_path).write("run_start", 0)
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"time": "2026-01-01T00:00:00+00:00", "event": "chec')
    before = (tmp_path / "ledger.jsonl").read_bytes()
    Ledger(tmp_path).write("resume", 5, checkpoint="step-00000005")
    assert (tmp_path / "ledger.jsonl").read_bytes().startswith(before), "what was written is never changed"
    assert [event["event"] for event in ledger.read(tmp_path)] == ["run_start", "resume"]


def test_a_full_disk_takes_a_line_whole_or_not_at_all(tmp_path, caplog):
    """A limit of file sizes stands for the disk: it too lets the first part of a write through."""
    book, path = Ledger(tmp_path), tmp_path / "ledger.jsonl"
    book.write("run_start", 0)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        book.write("checkpoint", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in caplog.text
    assert path.read_bytes() == before
    book.write("run_end", 2)
    assert [event["event"] for event in ledger.read(tmp_path)] == ["run_start", "run_end"]


def judged(loss: float) -> Judged:
    values = {"loss": np.float32(loss), "tokens": np.arange(6, dtype=np.float32).reshape(2, 3)}
    return Judged(stage="base", detectors={"stage": "base"}, policy={"rewinds": 1, "x": float("nan")}, values=values)


def test_what_a_step_was_judged_by_reads_back_to_the_last_digit_and_is_never_overwritten(tmp_path):
    book = Ledger(tmp_path)
    losses = {"judged/step-00000031.npz": 0.1, "judged/step-00000031-2.npz": math.nan, "judged/step-00000031-3.npz": 9}
    assert [book.keep(31, judged(loss)) for loss in losses.values()] == list(losses)
    assert sorted(path.name for path in (tmp_path / "judged").iterdir()) == sorted(name[7:] for name in losses)
    for name, loss in losses.items():
        got, put = Judged.read(tmp_path / name), judged(loss)
        assert repr((got.stage, got.detectors, got.policy)) == repr((put.stage, put.detectors, put.policy))
        assert {n: v.tobytes() for n, v in got.values.items()} == {n: v.tobytes() for n, v in put.values.items()}
        assert got.values["tokens"].shape == (2, 3)


def test_a_full_disk_takes_what_a_step_was_judged_by_whole_or_not_at_all(tmp_path, caplog):
    book = Ledger(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        assert book.keep(31, judged(1.0)) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-00000031.npz cannot be written" in caplog.text
    assert list((tmp_path / "judged").iterdir()) == []


def test_a_disk_that_takes_no_more_is_warned_of_once(tmp_path, caplog):
    book = Ledger(tmp_path / "not there")
    with caplog.at_level(logging.WARNING):
        book.write("checkpoint", 1)
        book.write("checkpoint", 2)
    assert len(caplog.records) == 1
    assert "ledger.jsonl" in caplog.text
