"""Run SQL on a run's metrics, in its folder (DuckDB) or at a server (Flight). cli/monitor.py prints the rows."""

import json
import re

import duckdb
import pyarrow as pa

from steptron.config.validate_monitoring import is_loopback
from steptron.errors import SteptronError
from steptron.monitor.server.protocol import call_headers, read_file, read_token
from steptron.monitor.storage.database import Database
from steptron.monitor.storage.files import FOLDER_NAME, Folder


def query_folder(source: str, sql: str) -> pa.Table:
    """Query a run folder, or a folder of metrics, by path or URL."""
    places = [f"{source.rstrip('/')}/{FOLDER_NAME}", source]
    folder = next((place for place in places if Folder.at(place).tables()), None)
    if folder is None:
        raise SteptronError(
            f"{source} has no metrics: {places[0]} holds no tables; a run folder does, once its run has done some steps"
        )
    try:
        with Database(folder) as database:
            return database.run(lambda connection: _rows(connection, sql))
    except duckdb.Error as error:
        raise SteptronError(f"SQL: {error}") from error


def query_server(address: str, run: str, sql: str, token_file: str = "", certificate: str = "") -> pa.Table:
    """Query a metrics server."""
    import pyarrow.flight as flight

    if not run:
        raise SteptronError("--run is missing: a server knows several runs; give the name of one")
    scheme, _, place = address.partition("://")
    if token_file and scheme == "grpc" and not is_loopback(place.rpartition(":")[0]):
        raise SteptronError(
            f"--token-file with {address} would send the token unencrypted; use grpc+tls://{place} with --tls-ca; "
            "without TLS, tokens go to loopback only"
        )
    more = {"tls_root_certs": read_file(certificate, "certificate")} if certificate else {}
    headers = call_headers(read_token(token_file) if token_file else None)
    ticket = flight.Ticket(json.dumps({"run": run, "sql": sql}).encode())
    try:
        with flight.FlightClient(address, **more) as client:
            return client.do_get(ticket, flight.FlightCallOptions(headers=headers)).read_all()
    except flight.FlightUnavailableError as error:
        raise SteptronError(f"no metrics server answers at {address}: {_reason(error)}") from error
    except (flight.FlightError, pa.ArrowException) as error:
        raise SteptronError(f"{address}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the message of a Flight error, without the library's own additions."""
    text = str(error).split(". Detail: ")[0].split(". gRPC client debug context")[0]
    return re.sub(r"^Flight \w+ error: |^Flight returned [^:]*: ", "", text)


def _rows(connection: duckdb.DuckDBPyConnection, sql: str) -> pa.Table:
    """Return all rows of a statement; an empty table if it has none."""
    relation = connection.sql(sql)
    return pa.table({}) if relation is None else relation.to_arrow_table()
