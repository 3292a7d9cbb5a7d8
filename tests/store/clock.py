"""A clock for statements that ask PostgreSQL itself what time it is."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from jobsvc.store.database import Database
from jobsvc.store.dialects.prepared import Statement

_MAKE = """
CREATE SCHEMA test_clock;
CREATE TABLE test_clock.moved (frozen timestamptz, elapsed interval NOT NULL);
INSERT INTO test_clock.moved VALUES (NULL, interval '0');
CREATE FUNCTION test_clock.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
    AS 'SELECT coalesce(frozen, pg_catalog.clock_timestamp()) + elapsed FROM test_clock.moved';
"""
_SET = Statement(
    "set_clock",
    ("timestamptz", "interval"),
    "UPDATE test_clock.moved SET frozen = $1, elapsed = $2",
)


def make_clock(database: Database) -> None:
    """In a database whose `once` has not been used yet: from then on it goes by this clock."""
    with database.engine.begin() as connection:
        connection.exec_driver_sql(_MAKE)

    def look_here_first(connection: Any, _record: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET search_path = test_clock, pg_catalog, public")

    sa.event.listen(database._single, "connect", look_here_first)


def set_clock(database: Database, frozen: datetime | None, elapsed: timedelta) -> None:
    """Ahead by `elapsed`, of `frozen` or else of the real time."""
    database.once(_SET, frozen, elapsed)
