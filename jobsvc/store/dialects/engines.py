"""How each database is connected to, and what its errors mean."""

from __future__ import annotations

import re
import sqlite3
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

STATEMENT_TIMEOUT_MS = 5_000
LOCK_TIMEOUT_MS = 1_000
IDLE_IN_TRANSACTION_TIMEOUT_MS = 10_000
SQLITE_WAIT_SECONDS = 2  # for another process that writes


def sqlite_url(path: Path) -> sa.URL:
    """Of a database file. Never made of text: what a path may hold has a meaning in a URL."""
    return sa.URL.create("sqlite", database=str(path))


def prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    _write_ahead(connection)
    connection.execute("PRAGMA synchronous=FULL")  # an answered commit survives a power cut
    connection.create_function("jobsvc_now", 0, lambda: time.time_ns() // 1000)


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Readers do not wait for the writer then."""
    # Of several processes that open a new file at once, SQLite lets one change its mode and
    # refuses the others without waiting.
    deadline = time.monotonic() + SQLITE_WAIT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def begin_sqlite(connection: sa.Connection) -> None:
    # IMMEDIATE: a transaction that reads and then writes cannot be upgraded once another has
    # written in between, so a writer takes the write lock first.
    write = connection.get_execution_options().get("jobsvc_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def postgresql_arguments(url: sa.URL) -> dict[str, Any]:
    """Defaults that the URL's own query overrides: time limits on the server, and liveness checks
    of the connection, so that a vanished server is noticed within seconds."""
    arguments: dict[str, Any] = {
        "connect_timeout": 5,
        "keepalives": 1,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
        "application_name": "jobsvc",
        "options": (
            f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c lock_timeout={LOCK_TIMEOUT_MS} "
            f"-c idle_in_transaction_session_timeout={IDLE_IN_TRANSACTION_TIMEOUT_MS} "
            "-c timezone=UTC -c jit=off"
        ),
    }
    if isinstance(url.host, str) or "host" in url.query:
        arguments["target_session_attrs"] = "read-write"
    return {key: value for key, value in arguments.items() if key not in url.query}


def sqlstate(error: DBAPIError) -> str | None:
    """The SQLSTATE; for SQLite the one that PostgreSQL would give for the like."""
    if isinstance(error.orig, sqlite3.Error):
        text = str(error.orig)
        if "locked" in text:
            return "40001"
        return "53100" if re.search(r"disk|full|readonly|unable to open", text) else "XX000"
    return getattr(error.orig, "pgcode", None)
