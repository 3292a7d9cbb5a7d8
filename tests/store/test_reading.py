"""Reads that are rendered once, and what PostgreSQL is told before them."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from jobsvc.store.database import Connection, Database
from jobsvc.store.dialects.reading import (
    by_index,
    id_text,
    in_microseconds,
    in_order,
    json_text,
    microseconds,
    moment,
    one_of,
)
from jobsvc.store.tables import jobs
from tests.store.house import House, new_id


@by_index
def everything(sqlite: bool) -> sa.Select[Any]:
    columns: tuple[sa.ColumnElement[Any], ...] = (
        id_text(jobs.c.id, sqlite).label("job_id"),
        json_text(jobs.c.labels, sqlite).label("labels"),
        microseconds(jobs.c.create_time, sqlite).label("created"),
        microseconds(jobs.c.finish_time, sqlite).label("finished"),
    )
    return sa.select(*columns).where(one_of(jobs.c.id, "ids", sqlite))


def test_values_are_the_same_on_every_database(house: House) -> None:
    job_id = house.submit(labels={"a%b": "c"})
    given = {"ids": [new_id(), job_id]}
    ((found, labels, created, finished),) = house.database.read(lambda c: everything(c, given))
    assert found == job_id
    assert labels.replace(" ", "") == '{"a%b":"c"}'
    assert moment(created) == house.get(job_id).create_time
    assert in_microseconds(moment(created)) == created
    assert finished is None


@pytest.mark.parametrize("kind", [by_index, in_order])
def test_what_the_planner_is_told_is_for_one_statement_alone(
    migrated_postgresql: Database, kind: Any
) -> None:
    names = ("enable_seqscan", "enable_bitmapscan", "enable_sort", "jit")

    def settings(sqlite: bool) -> sa.Select[Any]:
        return sa.select(*(sa.func.current_setting(name).label(name) for name in names))

    def read(connection: Connection) -> tuple[Any, Any, Any]:
        ask = sa.text(str(settings(False).compile(compile_kwargs={"literal_binds": True})))
        before = connection.execute(ask).one()
        (during,) = kind(settings)(connection, {})
        return before, during, connection.execute(ask).one()

    before, during, after = migrated_postgresql.read(read)
    assert tuple(during) == ("off", "off", "off" if kind is in_order else "on", "off")
    assert tuple(before) == tuple(after) != tuple(during)
