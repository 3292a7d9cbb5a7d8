"""Reads that are made all the time: rendered once, and then as little between them and the driver
as can be. On PostgreSQL SQLAlchemy's own work for a statement, and for the values of a row, costs
several times what the driver and the database do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, psycopg2

from jobsvc.store.dialects.prepared import OFF
from jobsvc.store.tables import EPOCH, MICROSECOND, JobId

# For one transaction. What is left to the planner are the indexes whose order the statement names.
BY_INDEX = "; ".join(f"SET LOCAL {way} = off" for way in OFF)

_POSTGRESQL: sa.Dialect = psycopg2.dialect()  # type: ignore[no-untyped-call]


class Read:
    """A SELECT by named parameters. `build` makes it, and is told whether it is for SQLite.

    On PostgreSQL it takes and gives what the driver does, whatever the types of its columns say:
    what the functions below make is the same on both databases.
    """

    def __init__(self, build: Callable[[bool], sa.Select[Any]], *, before: str = "") -> None:
        """`before`: what PostgreSQL is told first, in the same round trip. Where no transaction is
        under way, it is good for this statement alone."""
        self._build = build
        self._before = before

    def __call__(
        self, connection: sa.Connection, parameters: Mapping[str, Any]
    ) -> Sequence[Sequence[Any]]:
        if connection.dialect.name == "sqlite":
            return connection.execute(self._for_sqlite, parameters).all()
        text, fixed = self._rendered
        return connection.exec_driver_sql(text, {**fixed, **parameters}).all()

    @functools.cached_property
    def _for_sqlite(self) -> sa.Select[Any]:
        return self._build(True)

    @functools.cached_property
    def _rendered(self) -> tuple[str, Mapping[str, Any]]:
        """And what it always binds."""
        compiled = self._build(False).compile(dialect=_POSTGRESQL)
        text = f"{self._before};\n{compiled}" if self._before else str(compiled)
        return text, compiled.params


def by_index(build: Callable[[bool], sa.Select[Any]]) -> Read:
    """Whose plan does not depend on what the planner believes of the tables."""
    return Read(build, before=BY_INDEX)


def in_order(build: Callable[[bool], sa.Select[Any]]) -> Read:
    """As `by_index`, where an index has the order but for ties: it is followed from where it begins
    up to the limit, and what lies behind is not sorted."""
    return Read(build, before=f"{BY_INDEX}; SET LOCAL enable_sort = off")


def id_text(column: sa.ColumnElement[Any], sqlite: bool) -> sa.ColumnElement[str]:
    """A job's id in canonical text."""
    return sa.type_coerce(column, JobId) if sqlite else sa.cast(column, sa.Text)


def one_of(job_id: sa.ColumnElement[Any], name: str, sqlite: bool) -> sa.ColumnElement[bool]:
    """Whether a job's id is in the list that is bound as `name`."""
    if sqlite:
        return job_id.in_(sa.bindparam(name, expanding=True))
    kind: ARRAY[str] = ARRAY(JobId)
    return job_id == sa.any_(sa.bindparam(name, type_=kind))


def json_text(column: sa.ColumnElement[Any], sqlite: bool) -> sa.ColumnElement[str]:
    """A JSON value, not taken apart."""
    return sa.type_coerce(column, sa.Text) if sqlite else sa.cast(column, sa.Text)


def microseconds(column: sa.ColumnElement[Any], sqlite: bool) -> sa.ColumnElement[int]:
    """A time as microseconds since 1970."""
    if sqlite:
        return sa.type_coerce(column, sa.BigInteger)
    return sa.cast(sa.extract("epoch", column) * 1_000_000, sa.BigInteger)


def moment(microseconds: int) -> datetime:
    """Of so many since 1970."""
    return EPOCH + timedelta(microseconds=microseconds)


def in_microseconds(moment: datetime) -> int:
    return (moment - EPOCH) // MICROSECOND
