"""The live page's server: what it answers, to whom, and how it follows a run. In a browser: test_monitor_page.py."""

import gzip
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_run import FakeRun
from steptron.errors import SteptronError
from steptron.monitor.dashboard import live, report
from steptron.monitor.storage.ledger import Ledger


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server with a run under way, and the run."""
    monkeypatch.setattr(live, "REFRESH_EVERY_S", 0.0)
    run = FakeRun(tmp_path / "run", 40)
    run.advance(10)
    with live.LiveServer(run.run_dir, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server, run
        server.shutdown()
        thread.join()


def _get(server, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.headers), body


def _index(server) -> dict[str, str]:
    return json.loads(_get(server, "/data/index")[2])["documents"]


def test_documents_follow_the_run_and_only_what_changed_gets_a_new_tag(served):
    server, run = served
    before = _index(server)
    assert json.loads(_get(server, "/data/curves")[2])["step"][-1] == 10
    Ledger(run.run_dir).write("checkpoint", 10)
    between = _index(server)
    assert {name for name in before if before[name] != between[name]} == {"run", "ledger"}
    run.advance(10)
    after = _index(server)
    assert {name for name in after if after[name] != between.get(name)} >= {
        "run",
        "curves",
        "cells/layer_expert/tokens",
        "spread/layer_expert",
        "series/parameter",
    }
    assert json.loads(_get(server, "/data/curves")[2])["step"][-1] == 20
    assert json.loads(_get(server, "/data/cells/layer_expert/out_norm")[2])["slices"][-1] == [20, 20, "base"]


def test_the_live_page_has_the_reports_documents(served):
    server, run = served
    text = report.write_report(run.run_dir).read_text(encoding="utf-8")
    for name in _index(server):
        if name != "run":  # which says when it was written
            assert f'data-name="{name}">{_get(server, f"/data/{name}")[2].decode()}</script>' in text


def test_unchanged_is_not_sent_again(served):
    server, run = served
    for path in ("/data/index", "/data/curves", "/page.js"):
        status, headers, body = _get(server, path)
        assert (status, bool(body)) == (200, True)
        assert _get(server, path, If_None_Match=headers["ETag"])[::2] == (304, b"")
    _, headers, _ = _get(server, "/data/index")
    run.advance(1)
    assert _get(server, "/data/index", If_None_Match=headers["ETag"])[0] == 200
    status, headers, packed = _get(server, "/data/curves", Accept_Encoding="gzip")
    assert (status, headers["Content-Encoding"]) == (200, "gzip")
    assert gzip.decompress(packed) == _get(server, "/data/curves")[2]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("localhost", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:80", 403),
        ("evil.example@127.0.0.1.x", 403),
        ("", 403),
    ],
)
def test_only_requests_to_this_machine_by_name_are_answered(served, host, status):
    assert _get(served[0], "/data/index", Host=host)[0] == status


@pytest.mark.parametrize(
    "path",
    [
        "/recipe.yaml",
        "/data/../recipe.yaml",
        "/data/..%2f..%2frecipe.yaml",
        "/data//etc/passwd",
        "/page/page.css",
        "/data/",
        "/data/cells/x/y",
    ],
)
def test_nothing_else_is_there(served, path):
    assert _get(served[0], path)[0] == 404


def test_nothing_is_changed_by_asking(served):
    for method in ("POST", "PUT", "DELETE"):
        assert _get(served[0], "/", method)[0] == 501
    assert _get(served[0], "/", "HEAD")[::2] == (200, b"")


def test_pages_may_load_from_here_only(served):
    _, headers, body = _get(served[0], "/")
    assert headers["Content-Security-Policy"].startswith(
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"
    )
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert b"<script>" not in body
    assert b"<style>" not in body
    assert served[0].server_address[0] == "127.0.0.1"


def test_a_run_that_cannot_be_read_just_now_is_an_error_and_not_the_end(served, monkeypatch, caplog):
    server, _ = served
    monkeypatch.setattr(server.run, "refresh", lambda *_: 1 / 0)
    assert _get(server, "/data/index")[0] == 500
    assert "cannot be shown: ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    assert _get(server, "/data/index")[0] == 200


def test_a_taken_port_and_a_folder_that_is_no_run_are_one_line(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SteptronError, match=f"^port {port} of 127.0.0.1 cannot be used: .*0 for any that is free$"):
            live.serve(tmp_path / "run", port)
    with pytest.raises(SteptronError, match="is not a run folder"):
        live.serve(tmp_path / "none", 0)


def test_ctrl_c_ends_it_with_success(tmp_path):
    FakeRun(tmp_path / "run", 10).advance(2)
    # A shell's background job, and what it starts, begins with SIGINT ignored.
    code = f"""import signal
from pathlib import Path
from steptron.monitor.dashboard.live import serve
signal.signal(signal.SIGINT, signal.default_int_handler)
raise SystemExit(serve(Path({str(tmp_path / "run")!r}), 0))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:")
        connection = http.client.HTTPConnection(line.split("/")[2])
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
        assert (process.returncode, err) == (0, "")


def test_a_long_run_is_followed_quickly(tmp_path, monkeypatch):
    """100,000 steps are there; one more costs a look at the end of the file, not at all of it."""
    keys = ("loss", "grad_norm", "lr", "tokens_per_second")
    path = Path(tmp_path / "metrics.jsonl")
    with path.open("w") as file:
        for step in range(1, 100_001):
            file.write(
                f'{{"step": {step}, "stage": "base", "tokens": {step}, {", ".join(f"{key!r}: 1.5" for key in keys)}}}\n'.replace(
                    "'", '"'
                )
            )
    run = live.Dashboard(tmp_path)
    run.refresh()
    parsed = []
    monkeypatch.setattr("steptron.monitor.storage.jsonl.parse", lambda line: (parsed.append(line), json.loads(line))[1])
    with path.open("a") as file:
        file.write('{"step": 100001, "stage": "base", "tokens": 100001, "loss": 1.25}\n')
    run.refresh()
    assert len(parsed) == 1
    curves = json.loads(run.document("curves"))
    assert (curves["step"][-1], len(curves["step"])) == (100_001, len(curves["values"]["loss"]["mean"]))
    assert len(curves["step"]) <= 1501


def test_steps_that_are_done_again_take_the_place_of_the_old_ones(tmp_path):
    """As they are appended, and as a resume cuts the file."""

    def line(step: int, loss: float) -> str:
        return (
            f'{{"step": {step}, "stage": "base", "tokens": {step}, "loss": {loss}, "tokens_by_source": {{"a": 1}}}}\n'
        )

    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(step, 1.0) for step in range(1, 11)) + '{"step": 11, "lo')
    run = live.Dashboard(tmp_path)

    def seen() -> list[tuple[int, float]]:
        run.refresh()
        curves = json.loads(run.document("curves"))
        return list(zip(curves["step"], curves["values"]["loss"]["mean"], strict=True))

    assert seen() == [(step, 1.0) for step in range(1, 11)]
    with path.open("a") as file:
        file.write("\n" + line(8, 2.0))
    assert seen() == [*((step, 1.0) for step in range(1, 8)), (8, 2.0)]
    assert json.loads(run.document("run"))["sources"] == {"base": {"a": 8}}
    for count in (3, 30):  # shorter, and grown longer again before anybody looks
        (tmp_path / "new").write_text("".join(line(step, 1.5 + count) for step in range(1, count + 1)))
        (tmp_path / "new").replace(path)
        assert seen() == [(step, 1.5 + count) for step in range(1, count + 1)]
