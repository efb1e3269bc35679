"""Who may talk to the metrics server: token, TLS, and loopback only without them."""

import json
import socket
import subprocess

import pyarrow as pa
import pyarrow.flight as flight
import pytest
from steptron.cli.main import main
from steptron.errors import SteptronError
from steptron.monitor.dashboard.query import query_server
from steptron.monitor.server.protocol import RECEIVERS, call_headers

from plane_server import assert_stored, frame, make_sink, running
from waiting import PATIENCE_S, wait_until


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secrets")
    subprocess.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=steptron "
        "-addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout key.pem -out cert.pem".split(),
        cwd=folder,
        check=True,
        capture_output=True,
    )
    (folder / "token").write_text("a-token-for-tests\n")
    (folder / "other").write_text("another-token\n")
    return folder


@pytest.fixture(scope="module")
def server(secrets, tmp_path_factory):
    options = ["--token-file", "token", "--tls-cert", "cert.pem", "--tls-key", "key.pem"]
    options = [option if option.startswith("--") else str(secrets / option) for option in options]
    # With both it may be reached from outside.
    with running(tmp_path_factory.mktemp("secure") / "runs", *options, host="0.0.0.0") as running_server:
        running_server.address = running_server.address.replace("0.0.0.0", "127.0.0.1")
        yield running_server


def test_ranks_with_token_and_certificate_are_served(server, secrets, tmp_path):
    config = {"token_file": str(secrets / "token"), "certificate": str(secrets / "cert.pem")}
    sinks = [make_sink(server.address, tmp_path / "secure", rank, config=config) for rank in range(2)]
    for step in range(1, 4):
        for rank, sink in enumerate(sinks):
            sink.write(frame(rank, step))
    for sink in sinks:
        sink.close()
    assert_stored(server.plane("secure"), range(1, 4), range(2))
    address = f"grpc+tls://{server.address}"
    arguments = (address, "secure", "SELECT count(*) AS n FROM run")
    assert query_server(*arguments, config["token_file"], config["certificate"]).to_pylist() == [{"n": 3}]
    with pytest.raises(SteptronError, match="no token"):
        query_server(*arguments, "", config["certificate"])


@pytest.mark.parametrize("token", ["another-token", "", "a-token-for-test", "a-token-for-testsx", "\u00e4"], ids=repr)
def test_wrong_tokens_are_refused_for_every_kind_of_call(server, secrets, token):
    certificate = (secrets / "cert.pem").read_bytes()
    options = flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {token}".encode())] if token else [])
    with flight.FlightClient(f"grpc+tls://{server.address}", tls_root_certs=certificate) as client:
        for call in (
            lambda: list(client.do_action(flight.Action(RECEIVERS, b""), options)),
            lambda: client.do_get(flight.Ticket(b"{}"), options).read_all(),
            lambda: list(client.list_flights(options=options)),
            lambda: client.do_put(flight.FlightDescriptor.for_command(b"x"), pa.schema([]), options)[0].close(),
        ):
            with pytest.raises((flight.FlightUnauthenticatedError, pa.ArrowException)):
                call()


def test_a_flood_of_wrong_tokens_is_counted(server, secrets):
    certificate = (secrets / "cert.pem").read_bytes()
    options = flight.FlightCallOptions(headers=call_headers("guess"))
    before = len(server.journal())
    with flight.FlightClient(f"grpc+tls://{server.address}", tls_root_certs=certificate) as client:
        for _ in range(200):
            with pytest.raises(flight.FlightUnauthenticatedError):
                list(client.do_action(flight.Action(RECEIVERS, b""), options))
    wait_until(lambda: server.refused().get("wrong token", 0) >= 100)
    assert len(server.journal()) - before < 6
    assert "guess" not in json.dumps(server.journal())


def test_without_the_certificate_nothing_is_said(server, secrets):
    with flight.FlightClient(f"grpc://{server.address}") as client, pytest.raises(flight.FlightUnavailableError):
        list(client.do_action(flight.Action(RECEIVERS, b""), flight.FlightCallOptions(timeout=PATIENCE_S)))


def test_a_query_sends_no_token_in_clear(secrets):
    with pytest.raises(SteptronError, match="unencrypted"):
        query_server("grpc://10.255.255.1:8890", "run", "SELECT 1", str(secrets / "token"))
    with pytest.raises(SteptronError, match="no metrics server answers"):
        query_server("grpc://127.0.0.1:1", "run", "SELECT 1", str(secrets / "token"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--bind 0.0.0.0:0", "neither"),
        ("--bind [::]:0", "neither"),
        ("--bind 0.0.0.0:0 --token-file token", "only --token-file"),
        ("--bind 0.0.0.0:0 --tls-cert cert.pem --tls-key key.pem", "only --tls-cert"),
        ("--tls-cert cert.pem", "go together"),
        ("--bind 127.0.0.1", "is not an address; give HOST:PORT"),
        ("--bind 127.0.0.1:99999", "is not an address; give HOST:PORT"),
        ("--bind nowhere.invalid:1", "not an address of this machine"),
        ("--token-file none", "cannot be read"),
        ("--token-file empty", "holds no token"),
        ("--receivers 0", "--receivers=0 must be at least 1"),
        ("--bind 127.0.0.1:TAKEN", "cannot be used"),
    ],
)
def test_what_cannot_be_served_is_one_line(secrets, monkeypatch, capsys, options, says):
    monkeypatch.chdir(secrets)
    (secrets / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = options.replace("TAKEN", str(taken.getsockname()[1]))
        assert main(["monitor", "serve", *options.split()]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
