"""How each database is connected to, and what its errors mean."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psycopg2
import sqlalchemy as sa
from psycopg2.extensions import make_dsn
from sqlalchemy.exc import ArgumentError, DBAPIError

from jobsvc.errors import CannotStart

PSYCOPG2 = "postgresql+psycopg2"

# Of each transaction, by its BEGIN. Whoever waited for a lock reads what its holder has left.
ISOLATION = "READ COMMITTED"
STATEMENT_TIMEOUT_MS = 5_000
LOCK_TIMEOUT_MS = 1_000
IDLE_IN_TRANSACTION_TIMEOUT_MS = 10_000
SQLITE_WAIT_SECONDS = 2  # for another process that writes
CAUSE_CHARACTERS_MAX = 500

# What our statements rely on, whatever the server, the database, the role or the URL has for its
# other clients: what a statement sees, when it is durable, and what its literals and answers mean.
SESSION = {
    "default_transaction_isolation": ISOLATION.lower(),
    "timezone": "UTC",
    "datestyle": "ISO, MDY",
    "intervalstyle": "postgres",
    "standard_conforming_strings": "on",
    "extra_float_digits": "1",
    "array_nulls": "on",
    "transform_null_equals": "off",
}
# Of these, what is asked for and does no harm otherwise: times go and come with their offset, and
# the driver writes dates in one way only.
HARMLESS = frozenset({"timezone", "datestyle"})
# The same where the URL may have it otherwise.
DEFAULTS = {
    "statement_timeout": str(STATEMENT_TIMEOUT_MS),
    "lock_timeout": str(LOCK_TIMEOUT_MS),
    "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_TIMEOUT_MS),
    "synchronous_commit": "on",
    "jit": "off",
}


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


def database_url(text: str | sa.URL) -> sa.URL:
    """Raises CannotStart, which tells nothing of what the URL holds."""
    try:
        url = sa.make_url(text)
        fine = "@" not in (url.host or "")
    except (ValueError, ArgumentError):
        fine = False
    if not fine:
        raise CannotStart(
            "JOBSVC_DATABASE_URL cannot be read: what is special in a URL is written %40 for @, "
            "%3A for :, %2F for / in a user's name or password"
        )
    return url.set(drivername=PSYCOPG2) if url.drivername == "postgresql" else url


def postgresql_arguments(url: sa.URL) -> dict[str, Any]:
    """Limits on the server, and liveness checks of the connection, so that a vanished server is
    noticed within seconds: the URL's own query overrides these. And what a session relies on, which
    it does not. Raises CannotStart for what libpq has no such option."""
    defaults: dict[str, Any] = {
        "connect_timeout": 5,
        "keepalives": 1,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
        "application_name": "jobsvc",
    }
    if isinstance(url.host, str) or "host" in url.query:
        defaults["target_session_attrs"] = "read-write"
    arguments = {key: value for key, value in defaults.items() if key not in url.query}
    own = url.query.get("options", "")
    # Of two that set the same the later one counts.
    options = (_options(DEFAULTS), *((own,) if isinstance(own, str) else own), _options(SESSION))
    arguments |= {"client_encoding": "utf8", "options": " ".join(filter(None, options))}
    try:
        make_dsn(**{**dict(url.query), **arguments})
    except psycopg2.ProgrammingError as error:
        raise CannotStart(f"JOBSVC_DATABASE_URL: {cause(error)}") from None
    return arguments


def _options(settings: Mapping[str, str]) -> str:
    return " ".join(
        f"-c {name}={value.replace(' ', chr(92) + ' ')}" for name, value in settings.items()
    )


def cause(error: BaseException | None) -> str:
    """What a driver says first, and of each further address that it tried; without details and
    hints, which may quote what was given."""
    first, *others = str(error).strip().splitlines() or [""]
    tried = [line for line in others if line.startswith("connection to server")]
    return "; ".join([first, *tried])[:CAUSE_CHARACTERS_MAX]


def sqlstate(error: DBAPIError) -> str | None:
    """The SQLSTATE; for SQLite the one that PostgreSQL would give for the like."""
    if isinstance(error.orig, sqlite3.Error):
        text = str(error.orig)
        if "locked" in text:
            return "40001"
        return "53100" if re.search(r"disk|full|readonly|unable to open", text) else "XX000"
    return getattr(error.orig, "pgcode", None)
