"""Failures inside the metrics server, one at a time: stores that fail half-way, torn files, late frames of many ranks."""

import json
import os
import threading
from multiprocessing import Pipe
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from steptron.monitor.server.protocol import Hello, RefusedError
from steptron.monitor.server.receiver import Receiver, _schema_of
from steptron.monitor.server.reducer import Reducer, make_reducer
from steptron.monitor.server.shared import Slots
from steptron.monitor.server.writer import WriteJob, Writer
from steptron.monitor.statistics.merge import MismatchError, check_match
from steptron.monitor.statistics.registry import Registry
from steptron.monitor.storage import store
from steptron.monitor.storage.compact import recover
from steptron.monitor.storage.files import Folder
from steptron.monitor.storage.store import Store

from plane_server import LAYERS, rank_plane, rank_registry
from planes import steps_in
from waiting import PATIENCE_S

PART = "server-00"


def make_registry(*names: str) -> Registry:
    registry = Registry()
    for name in names:
        registry.add(name, unit="1", reduction="sum", axes={"layer": LAYERS})
        registry.add(f"{name}_all", unit="1", reduction="sum", axes={})
    return registry


def job(written: Store, registry: Registry, step: int, **changes) -> WriteJob:
    plane = np.full(registry.slots, step, np.float32)
    values = {"key": ("run", 0), "store": written, "registry": registry, "attempt": 1, "step": step, "plane": plane}
    return WriteJob(**values | {"ranks": frozenset([0]), "absent": None, "late": False} | changes)


def sums(folder, name: str = "x") -> dict[int, float]:
    rows = store.connect(folder).execute(f"SELECT step, sum({name}) FROM layer GROUP BY 1 ORDER BY 1")
    return dict(rows.fetchall())


class Ranks:
    """Streams into a reducer in this process, as a receiver would bring them."""

    def __init__(self, folder):
        self.reducer: Reducer = make_reducer(str(folder), folder / "server.jsonl", "here:1", 60.0, 100, 60.0)
        self.ours, theirs = Pipe()
        self.reducer._links = [theirs]
        self.numbers = iter(range(1000))

    def open(self, rank: int, registry: Registry | None = None, **changes) -> int:
        """Say hello; the number of the stream."""
        number, registry = next(self.numbers), registry or rank_registry(rank)
        values = {"run": "run", "uid": "0123456789", "rank": rank, "ranks": 2, "server": 0, "servers": 1}
        values |= {"attempt": 1, "resumed": 0, "late": False, "registry": registry.to_dict()} | changes
        slots = Slots.fitting(registry.slots)
        self.ours.send(("open", number, Hello(**values), slots.values, slots.count))
        self.slots = getattr(self, "slots", {}) | {number: slots}
        slots.send(self.ours, os.getpid())
        self.handle()
        return number

    def send(self, stream: int, count: int, step: int, values: np.ndarray) -> None:
        """A frame."""
        slots = self.slots[stream]
        slots.view(count % slots.count)[:] = values
        self.ours.send(("frame", stream, count, step, count % slots.count, True))
        self.handle()

    def handle(self) -> None:
        self.reducer._receive(0, self.reducer._links[0])

    def heard(self) -> list[tuple]:
        """What the reducer has said."""
        found = []
        while self.ours.poll(0.05):
            found.append(self.ours.recv())
        return found

    def flush(self) -> None:
        """Write all."""
        self.reducer._writer.close()
        self.reducer._settle()


def test_a_truncation_that_fails_is_done_before_anything_is_written(tmp_path, monkeypatch):
    registry = make_registry("x")
    written = Store(tmp_path, PART, registry, 1 << 30)
    for step in range(1, 10):
        written.add(step, np.full(registry.slots, step, np.float32))
    written.flush()
    failing = [True]
    real = Store.truncate_after

    def truncate_after(self, *arguments):
        if failing[0]:
            raise RuntimeError("ClientError: slow down")
        real(self, *arguments)

    monkeypatch.setattr(Store, "truncate_after", truncate_after)
    writer = Writer(1, 60.0, lambda: None)
    writer.truncate_after(("run", 0), written, 4, 2, lambda part: False)
    writer.truncate_after(("run", 0), written, 6, 3, lambda part: False)
    writer.write(job(written, registry, 7))
    outcome = writer.outcomes.get(timeout=PATIENCE_S)
    assert outcome.error is not None
    assert "slow down" in outcome.error
    assert max(sums(tmp_path)) == 9
    failing[0] = False
    writer.write(job(written, registry, 7))
    assert writer.outcomes.get(timeout=PATIENCE_S).error is None
    writer.close()
    assert writer.failure is None
    assert list(sums(tmp_path)) == [1, 2, 3, 4, 7], "steps after 4 were of the attempt before"
    assert written.attempt == 3


def test_steps_in_memory_are_of_the_attempt_that_they_came_in(tmp_path):
    """A run goes back to step 3 while its first five are not on disk yet: of these, two are undone, and step 4 comes
    again."""
    registry = make_registry("x")
    written = Store(tmp_path, PART, registry, 1 << 30)
    writer = Writer(1000, 60.0, lambda: None)
    for step in range(1, 6):
        writer.write(job(written, registry, step))
    writer.truncate_after(("run", 0), written, 3, 2, lambda part: False)
    writer.write(job(written, registry, 4))
    writer.close()
    assert writer.failure is None
    assert sums(tmp_path) == {step: 3.0 * step for step in range(1, 5)}, "each once, and none after 4"
    assert written.attempt == 2


@pytest.mark.parametrize("error", [OSError("Input/output error"), RuntimeError("ClientError")], ids=["OS", "remote"])
@pytest.mark.parametrize("url", ["", "memory://failures-{}/metrics"], ids=["local", "fsspec"])
def test_a_flush_that_fails_half_way_leaves_nothing_and_its_steps_come_again(tmp_path, monkeypatch, url, error):
    folder = url.format(f"{tmp_path.name}-{type(error).__name__}") if url else tmp_path
    registry = make_registry("x")
    written = Store(folder, PART, registry, 1 << 30)
    place, target, left = written.folder, "pipe_file" if url else "replace", [2 if url else 1]
    owner = type(place.fs) if url else type(tmp_path)
    real, remove, broken = getattr(owner, target), type(place.fs).rm_file, [True]

    def fail(self, path, *more, **options):
        if ".parquet" in str(path):
            left[0] -= 1
            if left[0] < 0:
                raise error
        return real(self, path, *more, **options)

    def refuse(self, path):
        if broken[0]:
            raise error
        remove(self, path)

    monkeypatch.setattr(owner, target, fail)
    monkeypatch.setattr(type(place.fs), "rm_file", refuse)
    writer = Writer(1, 60.0, lambda: None)
    left[0] = 1
    writer.write(job(written, registry, 1))
    assert str(error) in str(writer.outcomes.get(timeout=PATIENCE_S).error)
    assert len(place.files()) == 1, "it cannot even be removed"
    left[0] = 1 << 30
    writer.write(job(written, registry, 1))
    assert writer.outcomes.get(timeout=PATIENCE_S).error is not None, "not before it is"
    written.add(1, np.zeros(registry.slots, np.float32))
    with pytest.raises(OSError, match=str(error)):  # also what is none: sinks may raise nothing else
        written.flush()
    broken[0] = False
    writer.write(job(written, registry, 1))
    assert writer.outcomes.get(timeout=PATIENCE_S).error is None
    writer.close()
    assert writer.failure is None
    assert len(place.files()) == 2
    assert sums(folder) == {1: 3.0}
    assert store.connect(folder).execute("SELECT x_all FROM run").fetchall() == [(1.0,)]


def test_late_frames_of_many_ranks_take_few_files_and_keep_every_registry(tmp_path):
    kinds = [make_registry(name) for name in ("x", "y", "z")]
    written = Store(tmp_path, PART, Registry(), 1 << 30)
    writer = Writer(1000, 60.0, lambda: None)
    for step in range(1, 31):
        for rank, registry in enumerate(kinds):
            writer.write(job(written, registry, step, ranks=frozenset([rank]), late=True))
    writer.close()
    assert len(Folder.at(tmp_path).files(table="layer")) == 3
    assert steps_in(tmp_path) == {step: frozenset([0, 1, 2]) for step in range(1, 31)}
    for name in "xyz":
        assert sums(tmp_path, name) == {step: 3.0 * step for step in range(1, 31)}
    found = Folder.at(tmp_path).registry_files()
    assert [(file.first, file.again) for file in found] == [(1, 0), (1, 1), (1, 2)]
    known = store.registries(tmp_path)
    assert [one.identity for one in known] == [one.identity for one in kinds]
    follows = [
        json.loads((tmp_path / "registry" / file.path.rpartition("/")[2]).read_text())["follows"] for file in found
    ]
    assert follows == [None, f"{PART}-00000001.json", f"{PART}-00000001.1.json"]
    again = Store(tmp_path, PART, Registry(), 1 << 30)
    for registry in kinds:
        again.lay_out(registry, late=True)
        again.add(31, np.zeros(registry.slots, np.float32))
        again.flush()
    assert len(Folder.at(tmp_path).registry_files()) == 3, "known already"
    again.truncate_after(0)
    assert not Folder.at(tmp_path).registry_files()


def test_a_torn_file_is_put_aside_with_the_flush_that_it_is_of(tmp_path, caplog):
    registry = make_registry("x")
    written = Store(tmp_path, PART, registry, 2)
    for step in range(1, 7):
        written.add(step, np.full(registry.slots, step, np.float32))
    first, second, _ = Folder.at(tmp_path).files(PART, "run")
    (tmp_path / "run" / first.path.rpartition("/")[2]).write_bytes(b"")
    torn = tmp_path / "layer" / second.path.rpartition("/")[2]
    content = torn.read_bytes()
    torn.write_bytes(content[:-300] + bytes(292) + content[-8:])  # the footer, which does not even say that it is torn
    coverage, _ = recover(Folder.at(tmp_path), PART)
    assert dict(coverage) == {5: frozenset([0]), 6: frozenset([0])}
    assert len(list(tmp_path.glob("*/*.torn"))) == 4
    assert sums(tmp_path) == {5: 15.0, 6: 18.0}
    assert any("put aside" in record.message for record in caplog.records)


def test_registries_that_do_not_go_together_reset_their_streams_alone(tmp_path, monkeypatch):
    ranks = Ranks(tmp_path)
    one, two = ranks.open(0), ranks.open(1)
    other = ranks.open(0, run="other", ranks=1)
    ranks.heard()
    monkeypatch.setattr("steptron.monitor.statistics.merge._union", lambda registries: 1 / 0)
    ranks.send(one, 0, 1, rank_plane(0, 1))
    ranks.send(two, 0, 1, rank_plane(1, 1))
    said = [(kind, number) for kind, number, *_ in ranks.heard()]
    assert ("reset", one) in said
    assert ("reset", two) in said
    monkeypatch.undo()
    ranks.send(other, 0, 1, rank_plane(0, 1))
    again = [ranks.open(0), ranks.open(1)]
    for rank, stream in enumerate(again):
        ranks.send(stream, 0, 1, rank_plane(rank, 1))
    ranks.flush()
    assert steps_in(tmp_path / "run" / "metrics") == {1: frozenset([0, 1])}
    assert steps_in(tmp_path / "other" / "metrics") == {1: frozenset([0])}
    assert ranks.reducer._journal.refused["failed"] == 2


def test_a_message_that_cannot_be_handled_resets_its_stream(tmp_path, monkeypatch):
    ranks = Ranks(tmp_path)
    stream = ranks.open(0, ranks=1)
    with monkeypatch.context() as broken:
        broken.setattr(Reducer, "_close_if_whole", lambda self, run, number: {}["bug"])
        ranks.send(stream, 0, 1, rank_plane(0, 1))
    assert ("reset", stream) in [row[:2] for row in ranks.heard()]
    with monkeypatch.context() as broken:
        broken.setattr("steptron.monitor.server.reducer.recover", lambda *_: {}["bug"])
        refused = ranks.open(0, run="other")
    assert next(row for row in ranks.heard() if row[:2] == ("opened", refused))[2] is not None
    ranks.flush()


def test_a_derived_name_is_no_other_ranks_statistic():
    mine, other = make_registry("x"), make_registry("y")
    mine.derive("y", unit="1", powers={"x": 2})
    for one, two in ((mine, other), (other, mine)):
        with pytest.raises(MismatchError, match="'y' is derived"):
            check_match(one, {3: two})


def test_late_frames_that_another_part_has_are_not_stored_twice(tmp_path):
    """Two servers before the resume, one after it: what the second had written and not yet confirmed comes again."""
    folder = tmp_path / "run" / "metrics"
    registry = rank_registry(1)
    written = Store(folder, "server-01", registry, 1 << 30, attempt=1)
    for step in range(1, 4):
        written.add(step, rank_plane(1, step), {1})
    written.close()
    ranks = Ranks(tmp_path)
    stream = ranks.open(1, registry, attempt=2, resumed=5, late=True)
    for count, step in enumerate(range(1, 6)):
        ranks.send(stream, count, step, rank_plane(1, step))
    ranks.flush()
    assert steps_in(folder, PART) == {4: frozenset([1]), 5: frozenset([1])}
    assert steps_in(folder) == {step: frozenset([1]) for step in range(1, 6)}
    assert ("ack", stream, 5) in ranks.heard()


def test_two_runs_of_one_name_at_once(tmp_path):
    ranks = Ranks(tmp_path)
    first = ranks.open(0, ranks=1)
    second = ranks.open(0, uid="another0", attempt=2)
    said = {row[1]: row[2] for row in ranks.heard() if row[0] == "opened"}
    assert said[first] is None
    assert "taken by another run" in said[second]
    ranks.ours.send(("gone", first))
    ranks.handle()
    place = Folder.at(tmp_path / "run" / "metrics")
    assert place.own("0123456789") == "0123456789"  # the first has claimed the name, and never wrote anything
    third = ranks.open(0, ranks=1, uid="another0", attempt=2)
    assert {row[1]: row[2] for row in ranks.heard() if row[0] == "opened"} == {third: None}
    ranks.send(third, 0, 1, rank_plane(0, 1))
    ranks.flush()
    assert steps_in(place.path) == {1: frozenset([0])}
    assert place.owner() == "another0"


def test_all_ranks_of_a_run_have_one_uid(tmp_path):
    place = Folder.at(tmp_path / "metrics")
    found = []
    threads = [threading.Thread(target=lambda n=n: found.append(place.own(f"uid{n:05d}"))) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [place.owner()] * 20


def test_a_stream_that_breaks_is_a_refusal():
    """Arrow cannot read what comes: at the beginning, or between two frames."""
    reader = Mock()
    reader.read_chunk.side_effect = pa.ArrowInvalid("Expected to be able to read 64 bytes")
    with pytest.raises(RefusedError, match="not a frame: Expected to be able"):
        Receiver._take(Mock(), 0, Mock(), Mock(), reader)

    class Broken:
        @property
        def schema(self):
            raise pa.ArrowInvalid("Tried reading schema message")

    with pytest.raises(RefusedError, match="not a frame: Tried reading"):
        _schema_of(Broken())
