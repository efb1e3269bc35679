"""The metrics server as ranks meet it: real processes on loopback, and what is in the store afterwards."""

import json
import struct
import threading
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from steptron.monitor.server import protocol
from steptron.monitor.server.receiver import Receiver
from steptron.monitor.sinks import backlog
from steptron.monitor.statistics.frame import Frame
from steptron.monitor.storage import database, store

from plane_server import (
    assert_stored,
    expected_cells,
    frame,
    free_port,
    make_sink,
    rank_plane,
    rank_registry,
    running,
    uid_of,
)
from planes import steps_in
from waiting import PATIENCE_S, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("server") / "runs", "--receivers", "2") as running_server:
        yield running_server


@pytest.fixture(autouse=True)
def short_pauses_and_patient_closes(monkeypatch):
    monkeypatch.setattr("steptron.monitor.sinks.server._PAUSES_S", (0.05, 0.3))
    monkeypatch.setattr("steptron.monitor.sinks.server.CLOSE_S", PATIENCE_S)


def hello(run: str, rank: int = 0, **changes) -> dict:
    values = {
        "run": run,
        "uid": "0123456789abcdef",
        "rank": rank,
        "ranks": 1,
        "server": 0,
        "servers": 1,
        "attempt": 1,
        "resumed": 0,
        "late": False,
    }
    return values | {"registry": rank_registry(rank).to_dict()} | changes


def put(address: str, command: bytes, frames, schema: pa.Schema = protocol.SCHEMA) -> int:
    """Send frames (arrays, with their metadata) as they are; how many the server has on disk at the end. Raises what it
    answers."""
    with flight.FlightClient(f"grpc://{address}") as client:
        writer, reader = client.do_put(flight.FlightDescriptor.for_command(command), schema)
        done = 0
        with writer:
            for values, metadata in frames:
                batch = pa.RecordBatch.from_arrays([pa.array(values.tolist(), schema.field(0).type)], schema=schema)
                writer.write_with_metadata(batch, metadata)
            writer.done_writing()
            while (answer := reader.read()) is not None:
                done = protocol.decode_number(answer.to_pybytes())
        return done


def test_ranks_with_cells_of_their_own_and_shared_ones_are_put_together(server, tmp_path):
    sinks = [make_sink(server.address, tmp_path / "whole", rank, 3) for rank in range(3)]
    for step in range(1, 31):
        for rank in range(3):
            sinks[rank].write(frame(rank, step))
    for sink in sinks:
        sink.close()
        assert not len(sink._backlog)
    assert_stored(server.plane("whole"), range(1, 31), range(3))
    rows = store.connect(server.plane("whole")).execute("SELECT layer, expert, rms FROM layer_expert WHERE step = 9")
    squares, counts = (expected_cells(name, 9, range(3)) for name in ("square_sum", "rows"))
    for layer, expert, rms in rows.fetchall():
        assert rms == pytest.approx((squares[layer, expert] / counts[layer, expert]) ** 0.5)
    vitals = list(database.vital_planes(server.plane("whole")))
    assert [step for step, _, _ in vitals] == list(range(1, 31))
    for step, registry, plane in vitals:
        np.testing.assert_array_equal(plane, rank_plane(0, step)[: registry.vital_slots])


@pytest.fixture
def impatient_server(tmp_path):
    """A server that waits a second for a rank."""
    with running(tmp_path / "impatient", "--timeout", "1") as running_server:
        yield running_server


def test_a_missing_rank_is_named_and_its_late_frame_becomes_part_of_the_step(impatient_server, tmp_path):
    server = impatient_server
    sinks = [make_sink(server.address, tmp_path / "missing", rank) for rank in range(2)]
    for step in range(1, 6):
        sinks[0].write(frame(0, step))
    folder = server.plane("missing")
    wait_until(lambda: list(steps_in(folder)) == [1, 2, 3, 4, 5])
    assert set(steps_in(folder).values()) == {frozenset([0])}
    lines = [line for line in server.journal() if line["event"] == "missing" and line["run"] == "missing"]
    assert [(line["step"], line["ranks"]) for line in lines] == [(1, [1])], "named once"
    alone = store.connect(folder).execute(
        "SELECT DISTINCT expert FROM layer_expert WHERE square_sum IS NOT NULL ORDER BY 1"
    )
    assert alone.fetchall() == [(0,), (1,), (2,), (3,)]
    for step in range(1, 8):
        sinks[1].write(frame(1, step))
    for step in range(6, 8):
        sinks[0].write(frame(0, step))
    for sink in sinks:
        sink.close()
    assert_stored(folder, range(1, 8), range(2))


def test_a_frame_that_comes_twice_counts_once(server):
    command = json.dumps(hello("twice")).encode()
    frames = [(rank_plane(0, step), protocol.encode_number(step)) for step in (1, 2, 2, 1, 3)]
    assert put(server.address, command, frames) == 5
    assert put(server.address, command, frames[:2]) == 2
    assert_stored(server.plane("twice"), [1, 2, 3], [0])


def test_a_step_without_values_is_a_signal_all_the_same(server, tmp_path):
    sinks = [make_sink(server.address, tmp_path / "signal", rank) for rank in range(2)]
    for step in (1, 2):
        sinks[0].write(frame(0, step))
        plane = None if step == 1 else rank_plane(1, step)
        sinks[1].write(Frame(step=step, metrics={}, tokens_by_source={}, plane=plane))
    for sink in sinks:
        sink.close()
        assert not len(sink._backlog)
    assert steps_in(server.plane("signal")) == {1: frozenset([0, 1]), 2: frozenset([0, 1])}
    found = store.connect(server.plane("signal")).execute(
        "SELECT step, count(norm) FROM parameter GROUP BY 1 ORDER BY 1"
    )
    assert found.fetchall() == [(1, 2), (2, 3)]
    assert not [line for line in server.journal() if line.get("run") == "signal"]


def test_a_new_attempt_replaces_the_steps_that_are_done_again_and_may_have_another_registry(server, tmp_path):
    folder, run_dir = server.plane("resumed"), tmp_path / "resumed"
    for attempt, (steps, resumed, layers) in enumerate([((1, 9), None, [2, 5]), ((7, 13), 6, [2, 5, 7])], start=1):
        registries = [rank_registry(rank, layers) for rank in range(2)]
        options = {"attempt": attempt, "resumed": resumed}
        sinks = [make_sink(server.address, run_dir, rank, registry=registries[rank], **options) for rank in range(2)]
        for step in range(*steps):
            for rank in range(2):
                sinks[rank].write(frame(rank, step, registries[rank]))
        for sink in sinks:
            sink.close()
    assert list(steps_in(folder)) == list(range(1, 13))
    names = sorted(path.name for path in (folder / "registry").iterdir())
    assert names == ["server-00-00000001.json", "server-00-00000007.json"]
    assert json.loads((folder / "registry" / names[1]).read_text())["follows"] == names[0]
    counts = store.connect(folder).execute("SELECT step, count(*) FROM layer GROUP BY 1 ORDER BY 1").fetchall()
    assert counts == [(step, 2 if step < 7 else 3) for step in range(1, 13)]
    with pytest.raises(flight.FlightServerError, match="attempt that is over"):
        put(server.address, json.dumps(hello("resumed", ranks=2, uid=uid_of(run_dir))).encode(), [])


def test_another_run_of_the_same_name_is_refused_and_the_first_ones_data_stay(server, tmp_path, monkeypatch, caplog):
    for attempt, folder in enumerate(("one", "two"), start=1):
        sinks = [make_sink(server.address, tmp_path / folder / "same", rank, attempt=attempt) for rank in range(2)]
        for step in range(1, 4 if folder == "one" else 3):
            for rank, sink in enumerate(sinks):
                sink.write(frame(rank, step))
        if folder == "two":
            wait_until(lambda: server.refused().get("another run", 0) > 0)
            monkeypatch.setattr("steptron.monitor.sinks.server.CLOSE_S", 0.5)
        for sink in sinks:
            sink.close()
    assert_stored(server.plane("same"), range(1, 4), range(2))
    lines = [line["text"] for line in server.journal() if line.get("kind") == "another run"]
    assert "run.name=same is taken by another run" in lines[0]
    warnings = [record for record in caplog.records if "is taken by another run" in record.message]
    assert len(warnings) == 2, "one a rank"


def test_a_rewind_within_a_run_voids_what_was_sent_of_later_steps(server, tmp_path):
    sinks = [make_sink(server.address, tmp_path / "rewound", rank) for rank in range(2)]
    other = {step: rank_plane(0, step + 500) for step in range(1, 8)}
    for step in range(1, 8):
        for sink, plane in zip(sinks, (other[step], rank_plane(1, step)), strict=True):
            sink.write(
                Frame(
                    step=step,
                    metrics={},
                    tokens_by_source={},
                    plane=plane if step > 4 else rank_plane(sink._rank, step),
                )
            )
    wait_until(lambda: len(steps_in(server.plane("rewound"))) >= 3)
    for rank, sink in enumerate(sinks):
        sink.truncate_after(4)
        for step in range(5, 10):
            sink.write(frame(rank, step))
    for sink in sinks:
        sink.close()
    assert_stored(server.plane("rewound"), range(1, 10), range(2))


BAD = {
    "no hello": (b"\x00\xff\x17", None, None),
    "a hello of another kind": (b'{"run": "bad"}', None, None),
    "run name": (json.dumps(hello("../../etc")).encode(), None, None),
    "rank": (json.dumps(hello("bad", 4)).encode(), None, None),
    "negative rank": (json.dumps(hello("bad") | {"rank": -1}).encode(), None, None),
    "registry": (json.dumps(hello("bad", registry={"version": 2})).encode(), None, None),
    "too many ranks": (json.dumps(hello("bad", ranks=1 << 40)).encode(), None, None),
    "too many servers": (json.dumps(hello("bad", servers=1 << 40)).encode(), None, None),
    "a late rank beyond all": (json.dumps(hello("bad", 1 << 40, late=True)).encode(), None, None),
    "uid": (json.dumps(hello("bad", uid="../x")).encode(), None, None),
    "SQL in a reduction": (json.dumps(hello("bad")).replace('"max"', '"max(1), x --"').encode(), None, None),
    "folder in an axis' name": (json.dumps(hello("bad")).replace('"expert"', '"../expert"').encode(), None, None),
    "too large": (json.dumps(hello("bad")).replace("[2, 5, 7]", json.dumps(list(range(1 << 14)))).encode(), None, None),
    "dtype": (json.dumps(hello("bad")).encode(), pa.schema([pa.field("values", pa.float64())]), None),
    "slots": (json.dumps(hello("bad")).encode(), None, (np.ones(7), protocol.encode_number(1))),
    "negative step": (json.dumps(hello("bad")).encode(), None, (rank_plane(0, 1), b"\xff" * 8)),
    "no step": (json.dumps(hello("bad")).encode(), None, (rank_plane(0, 1), b"12")),
    "nothing for a step": (json.dumps(hello("bad")).encode(), None, (rank_plane(0, 1), b"")),
    "a step that is NaN": (json.dumps(hello("bad")).encode(), None, (rank_plane(0, 1), struct.pack("<d", np.nan))),
    "a step beyond all": (json.dumps(hello("bad")).encode(), None, (rank_plane(0, 1), struct.pack("<q", 1 << 62))),
    "noise for a step": (json.dumps(hello("bad")).encode(), None, (rank_plane(0, 1), b"\x17\xff\x00" * 100)),
    "one value too many": (
        json.dumps(hello("bad")).encode(),
        None,
        (np.append(rank_plane(0, 1), 1), protocol.encode_number(1)),
    ),
    "one value": (json.dumps(hello("bad")).encode(), None, (np.ones(1), protocol.encode_number(1))),
    "nulls": (
        json.dumps(hello("bad")).encode(),
        None,
        (np.array([None, *rank_plane(0, 1)[1:]]), protocol.encode_number(1)),
    ),
    "integers": (json.dumps(hello("bad")).encode(), pa.schema([pa.field("values", pa.int32())]), None),
    "another column": (json.dumps(hello("bad")).encode(), pa.schema([pa.field("value", pa.float32())]), None),
    "a registry without its slots": (json.dumps(hello("bad")).replace('"slots"', '"slot"').encode(), None, None),
    "nested too deeply": (b"[" * 100_000, None, None),
    "a registry nested too deeply": (
        json.dumps(hello("bad", registry=0)).replace('"registry": 0', '"registry": ' + "[" * 100_000).encode(),
        None,
        None,
    ),
}


def test_malformed_frames_are_refused_and_counted_and_the_server_lives(server, tmp_path):
    kinds = list(BAD.values())
    random = np.random.default_rng(0)
    for number in range(200):
        command, schema, bad = kinds[number % len(kinds)]
        if number % len(kinds) == 0:
            command = random.bytes(int(random.integers(0, 200)))
        with pytest.raises((flight.FlightError, pa.ArrowException)):
            put(server.address, command, [] if bad is None else [bad], schema or protocol.SCHEMA)
    with flight.FlightClient(f"grpc://{server.address}") as client, pytest.raises(flight.FlightServerError):
        list(client.do_action(flight.Action("explode", b"")))
    assert len([line for line in server.journal() if line["event"] == "refused"]) < 40
    assert {"not a hello", "run name", "rank", "not a registry", "columns", "slots", "step", "nulls"} <= set(
        server.refused()
    )
    assert not server.plane("bad").exists()
    with (
        flight.FlightClient(f"grpc://{server.address}") as client,
        pytest.raises(flight.FlightServerError, match="letters, digits"),
    ):
        client.do_get(flight.Ticket(b'{"run": "a b", "sql": "SELECT 1"}')).read_all()
    sinks = [make_sink(server.address, tmp_path / "good", rank) for rank in range(2)]
    for rank, sink in enumerate(sinks):
        sink.write(frame(rank, 1))
    for sink in sinks:
        sink.close()
    assert_stored(server.plane("good"), [1], range(2))


@pytest.mark.parametrize("name", [name for name in BAD if BAD[name][2] is None])
def test_what_is_refused_at_the_start_is_logged(name):
    """Whatever is wrong with it, it is a refusal by name, and not an error that nobody counts."""
    command, schema, _ = BAD[name]
    link = Mock()
    receiver = Mock(_link=link)
    receiver._refuse = lambda error: Receiver._refuse(receiver, error)
    descriptor = flight.FlightDescriptor.for_command(command)
    with pytest.raises(flight.FlightServerError):
        Receiver.do_put(receiver, None, descriptor, Mock(schema=schema or protocol.SCHEMA), None)
    ((what, _, detail), _) = link.send.call_args
    assert (what, bool(detail)) == ("refused", True)


def test_nan_is_a_value(server):
    plane = rank_plane(0, 1)
    plane[0] = np.nan
    with flight.FlightClient(f"grpc://{server.address}"):
        assert put(server.address, json.dumps(hello("nan")).encode(), [(plane, protocol.encode_number(1))]) == 1
    assert np.isnan(store.connect(server.plane("nan")).execute("SELECT loss FROM run").fetchone()[0])


def test_another_meaning_of_a_statistic_is_refused(impatient_server):
    server = impatient_server
    command = json.dumps(hello("meaning", ranks=2)).encode()
    other = json.dumps(hello("meaning", 1, ranks=2)).replace('"max"', '"sum"').encode()
    with flight.FlightClient(f"grpc://{server.address}") as client:
        writer, _ = client.do_put(flight.FlightDescriptor.for_command(command), protocol.SCHEMA)
        writer.write_with_metadata(
            pa.RecordBatch.from_arrays([pa.array(rank_plane(0, 1).tolist(), pa.float32())], schema=protocol.SCHEMA),
            protocol.encode_number(1),
        )
        wait_until(lambda: list(steps_in(server.plane("meaning"))) == [1])
        with pytest.raises(flight.FlightServerError, match="'peak' is"):
            put(server.address, other, [])
        writer.close()


SQL = {
    "other files": "SELECT * FROM read_csv('/etc/passwd')",
    "other files by name": "SELECT * FROM '/etc/passwd'",
    "text": "SELECT * FROM read_text('/etc/hostname')",
    "the store's other folders": "SELECT * FROM glob('FOLDER/../*')",
    "write": "COPY (SELECT 1) TO 'FOLDER/x.csv'",
    "attach": "ATTACH 'FOLDER/x.db'",
    "settings": "SET enable_external_access = true",
    "two statements": "SELECT 1; SELECT 2",
    "create": "CREATE TABLE x AS SELECT 1",
    "install": "INSTALL httpfs",
    "no SQL": "SELEKT",
    "no such table": "SELECT * FROM nothing",
}


def select(server, run: str, sql: str) -> list[dict]:
    with flight.FlightClient(f"grpc://{server.address}") as client:
        ticket = flight.Ticket(json.dumps({"run": run, "sql": sql}).encode())
        return client.do_get(ticket).read_all().to_pylist()


def test_sql_answers_and_reads_nothing_but_the_run(server):
    put(server.address, json.dumps(hello("sql")).encode(), [(rank_plane(0, 4), protocol.encode_number(4))])
    rows = select(server, "sql", "SELECT step, parameter, norm FROM parameter ORDER BY parameter")
    expected = expected_cells("norm", 4, [0])
    assert rows == [{"step": 4, "parameter": cell, "norm": expected[cell,]} for cell in ("own.0", "shared")]
    for sql in SQL.values():
        with pytest.raises(flight.FlightServerError):
            pytest.fail(f"{sql} is answered: {select(server, 'sql', sql.replace('FOLDER', str(server.plane('sql'))))}")
    assert not list(server.plane("sql").glob("x*"))
    for run in ("none", "../runs", "", "sql\x00", "*"):
        with pytest.raises(flight.FlightServerError):
            select(server, run, "SELECT 1")


def test_a_store_that_cannot_be_written_loses_nothing(server, tmp_path):
    """As with a full disk: the server goes on, ranks keep their frames and come again."""
    folder = server.folder / "full"
    folder.mkdir()
    (folder / "metrics").write_text("in the way")
    sinks = [make_sink(server.address, tmp_path / "full", rank) for rank in range(2)]
    for step in range(1, 4):
        for rank, sink in enumerate(sinks):
            sink.write(frame(rank, step))
    wait_until(lambda: server.refused().get("store", 0) > 0)
    (folder / "metrics").unlink()
    wait_until(lambda: not any(len(sink._backlog) for sink in sinks))
    for sink in sinks:
        sink.close()
    assert_stored(folder / "metrics", range(1, 4), range(2))


def test_a_server_that_is_killed_and_started_again_loses_nothing(tmp_path):
    port, steps = free_port(), 60
    reached, go_on = ({step: threading.Event() for step in (10, 20, 50)} for _ in range(2))
    with running(tmp_path / "runs", port=port) as server:
        sinks = [make_sink(server.address, tmp_path / "killed", rank) for rank in range(2)]
        folder = server.plane("killed")

        def train() -> None:
            for step in range(1, steps + 1):
                for rank, sink in enumerate(sinks):
                    sink.write(frame(rank, step))
                if step in reached:
                    reached[step].set()
                    go_on[step].wait()

        training = threading.Thread(target=train, daemon=True)
        training.start()
        reached[10].wait()
        wait_until(lambda: len(steps_in(folder)) > 5)
        go_on[10].set()
        reached[20].wait()
        server.kill()  # with frames on their way
        assert 5 < len(steps_in(folder)) <= 20
        go_on[20].set()
        reached[50].wait()  # no write waits for a server: there is none
    with running(tmp_path / "runs", port=port):
        go_on[50].set()
        training.join()
        for sink in sinks:
            sink.close()
            assert sink.dropped == 0
    assert_stored(folder, range(1, steps + 1), range(2))


def test_frames_wait_on_local_disk_for_a_server_that_is_away(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(backlog, "MEMORY_BYTES", 1000)
    port = free_port()
    sinks = [make_sink(f"127.0.0.1:{port}", tmp_path / "away", rank) for rank in range(2)]
    for step in range(1, 26):
        for rank, sink in enumerate(sinks):
            sink.write(frame(rank, step))
    spool = tmp_path / "away" / "metrics" / "spool"
    wait_until(lambda: len(list(spool.glob("rank-*/*.npy"))) >= 30)
    with running(tmp_path / "runs", port=port) as server:
        wait_until(lambda: not any(len(sink._backlog) for sink in sinks))
        for sink in sinks:
            sink.close()
        assert_stored(server.plane("away"), range(1, 26), range(2))
    assert not list(spool.glob("rank-*/*.npy"))
    warnings = [record for record in caplog.records if "frames are kept" in record.message]
    assert len(warnings) == 2, "one a rank"


def test_what_no_server_took_is_sent_by_the_resumed_run_on_fewer_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr("steptron.monitor.sinks.server.CLOSE_S", 0.5)
    port, run_dir = free_port(), tmp_path / "late"
    for rank in range(3):
        sink = make_sink(f"127.0.0.1:{port}", run_dir, rank, 3)
        for step in range(1, 9):
            sink.write(frame(rank, step))
        sink.close()
    assert len(list(run_dir.glob("metrics/spool/rank-0000[012]/*.npy"))) == 24
    with running(tmp_path / "runs", port=port) as server:
        monkeypatch.setattr("steptron.monitor.sinks.server.CLOSE_S", PATIENCE_S)
        sinks = [make_sink(server.address, run_dir, rank, 2, attempt=2, resumed=6) for rank in range(2)]
        for step in range(7, 10):
            for rank, sink in enumerate(sinks):
                sink.write(frame(rank, step))
        for sink in sinks:
            sink.close()
        folder = server.plane("late")
        assert steps_in(folder) == {step: frozenset(range(3 if step < 7 else 2)) for step in range(1, 10)}
        found = store.connect(folder).execute("SELECT step, parameter, norm FROM parameter").fetchall()
        assert {(step, (parameter,)): norm for step, parameter, norm in found} == {
            (step, cell): value
            for step in range(1, 10)
            for cell, value in expected_cells("norm", step, range(3 if step < 7 else 2)).items()
        }


def test_the_oldest_frames_are_dropped_with_a_count_when_the_disk_is_full(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(backlog, "MEMORY_BYTES", 0)
    monkeypatch.setattr("steptron.monitor.sinks.server.CLOSE_S", 0.2)
    registry = rank_registry(0)
    registry.add("wide", unit="1", reduction="sum", axes={"position": range(50_000)})
    sink = make_sink(f"127.0.0.1:{free_port()}", tmp_path / "full", 0, 1, registry=registry, config={"buffer_mb": 1})
    for step in range(1, 13):
        sink.write(frame(0, step, registry))
        wait_until(lambda: sink._backlog._memory == 0)
    kept = sorted(int(path.name[:8]) for path in tmp_path.glob("full/metrics/spool/rank-00000/*.npy"))
    assert kept == list(range(8, 13)), "1 MiB holds five frames of 200 kB"
    assert sink.dropped == 7
    sink.close()
    assert len([record for record in caplog.records if "buffer_mb" in record.message]) == 1
    assert any("7 steps of metrics were dropped" in record.message for record in caplog.records)


def test_sigterm_writes_what_is_there_and_leaves(tmp_path):
    with running(tmp_path / "runs", "--flush", "60") as server:
        for rank, end in enumerate([(np.ones(1), protocol.encode_number(9)), (rank_plane(1, 9), b"?")]):
            frames = [(rank_plane(rank, step), protocol.encode_number(step)) for step in range(1, 5 - rank)]
            with pytest.raises((flight.FlightError, pa.ArrowException)):
                put(server.address, json.dumps(hello("stopped", rank, ranks=2)).encode(), [*frames, end])
        wait_until(lambda: {"slots", "step"} <= set(server.refused()))  # so the frames before those are in
        assert not server.plane("stopped").exists()
        assert server.stop() == 0
        expected = {step: frozenset(range(2)) for step in range(1, 4)} | {4: frozenset([0])}
        assert steps_in(server.plane("stopped")) == expected
        assert server.journal()[-1]["event"] == "stop"


def test_two_servers_share_the_ranks(tmp_path):
    with running(tmp_path / "runs") as one, running(tmp_path / "runs") as two:
        addresses = [one.address, two.address]
        sinks = [make_sink(addresses, tmp_path / "shared", rank, 4) for rank in range(4)]
        for step in range(1, 11):
            for rank, sink in enumerate(sinks):
                sink.write(frame(rank, step))
        for sink in sinks:
            sink.close()
        folder = one.plane("shared")
        assert set(steps_in(folder, "server-00").values()) == {frozenset([0, 2])}
        assert set(steps_in(folder, "server-01").values()) == {frozenset([1, 3])}
        assert_stored(folder, range(1, 11), range(4))
