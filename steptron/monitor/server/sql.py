"""SQL over one run's plane for untrusted callers: queries can only read, and only that plane.

Each call is one SELECT. DuckDB may open files in the plane's folder only, a query cannot change that, and its memory
and time are limited.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from steptron.monitor.server.protocol import RefusedError
from steptron.monitor.storage.database import Database
from steptron.monitor.storage.files import Folder

_MEMORY = "2GB"
_THREADS = 2
_BATCH_ROWS = 1 << 16


def sandbox(folder: str | Path) -> Database:
    """Return the plane's database, locked. Raises `RefusedError` if there is none."""
    place = Folder.at(folder)
    if not place.tables():
        raise RefusedError("unknown run", f"{str(folder)[-80:]} has no metrics plane")
    database = Database(folder, locked=True)
    connection = database.connection
    connection.execute(f"SET memory_limit = '{_MEMORY}'")
    connection.execute(f"SET threads = {_THREADS}")
    connection.execute("SET lock_configuration = true")
    return database


def check_select(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Raise `RefusedError` unless `sql` is one SELECT."""
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise RefusedError("SQL", str(error)) from error
    if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
        raise RefusedError("SQL", "one SELECT is taken, nothing else")


@contextmanager
def select(folder: str | Path, sql: str, timeout_s: float) -> Iterator[pa.RecordBatchReader]:
    """Return the rows of a SELECT in the sandbox.

    Raises `RefusedError`. Reading rows may raise `duckdb.Error`, also after `timeout_s` seconds.
    """
    database = sandbox(folder)
    timer = threading.Timer(timeout_s, database.connection.interrupt)
    timer.daemon = True
    try:
        check_select(database.connection, sql)
        timer.start()
        try:
            reader = database.run(lambda connection: connection.sql(sql).to_arrow_reader(_BATCH_ROWS))
        except duckdb.Error as error:
            raise RefusedError("SQL", str(error)) from error
        yield reader
    finally:
        timer.cancel()
        database.close()
