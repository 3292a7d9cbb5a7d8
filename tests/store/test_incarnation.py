"""Which database this is: a restored one is another, and events go on above those it has."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa

from jobsvc.store import migrating, schema
from jobsvc.store.database import Database, Transaction
from jobsvc.store.schema import is_home
from jobsvc.store.tables import job_events, jobs, service
from jobsvc.store.verbs import submit
from tests.services import fresh_database
from tests.store.conftest import connect, open_database
from tests.store.house import WAIT_SECONDS_MAX, House, new_job, together, wait_until_blocked

FAR = 10**9


@pytest.fixture
def own(pg_house: House) -> House:
    """With some events. Its database is that of other tests too: it stays in order."""
    pg_house.start()
    return pg_house


def facts(database: Database) -> Any:
    columns = service.c.incarnation, service.c.home, service.c.x_base
    return database.read(lambda c: c.execute(sa.select(*columns)).one())


def xs(house: House) -> list[int]:
    statement = sa.select(job_events.c.x).order_by(job_events.c.x)
    return list(house.database.read(lambda c: c.execute(statement).scalars()))


def put_ahead(tx: Transaction) -> None:
    """As if the events had come from a cluster that had got further."""
    tx.execute(sa.update(job_events).values(x=job_events.c.x + FAR))
    tx.execute(sa.update(jobs).values(last_x=jobs.c.last_x + FAR))


def test_the_first_start_notes_where_it_is_and_others_find_it_there(own: House) -> None:
    first = facts(own.database)
    cluster, timeline, database = first.home.split("/")
    assert int(cluster) > 0
    assert timeline == "00000001"
    assert int(database) > 0
    for start in (schema.require, migrating.migrate):
        start(own.database)
    assert facts(own.database) == first


def test_on_sqlite_there_is_nothing_to_note(sqlite_house: House) -> None:
    before = facts(sqlite_house.database)
    schema.require(sqlite_house.database)
    assert facts(sqlite_house.database) == before
    assert before.home == ""


def test_a_copy_is_another_database_and_the_original_is_not(postgresql_url: str) -> None:
    with fresh_database(postgresql_url) as url:
        original = open_database(url)
        before = facts(original)
        original.close()
        with fresh_database(postgresql_url, template=url.rpartition("/")[2]) as copied_url:
            copy = connect(copied_url)
            schema.require(copy)
            after = facts(copy)
            copy.close()
        schema.require(original)
        assert facts(original) == before
        original.close()
    assert after.incarnation != before.incarnation
    assert after.home.split("/")[:2] == before.home.split("/")[:2]
    assert after.home != before.home
    assert after.x_base == before.x_base  # its numbers go on


@pytest.mark.parametrize("part", [0, 1], ids=["cluster", "timeline"])
def test_another_cluster_or_timeline_is_another_incarnation(own: House, part: int) -> None:
    before = facts(own.database)
    elsewhere = before.home.split("/")
    elsewhere[part] = "7"
    move = sa.update(service).values(home="/".join(elsewhere))
    own.write(lambda tx: tx.execute(move))
    schema.require(own.database)
    after = facts(own.database)
    assert after.incarnation != before.incarnation
    assert (after.home, after.x_base) == (before.home, before.x_base)


def test_where_numbers_began_anew_events_go_on_above_those_that_are_there(own: House) -> None:
    own.write(put_ahead)
    before = facts(own.database)
    schema.require(own.database)
    after = facts(own.database)
    assert after.incarnation != before.incarnation
    assert after.x_base == max(xs(own)) >= FAR
    begin = own.page_after(None).end
    old = xs(own)
    claimed = own.start()
    assert xs(own)[: len(old)] == old
    assert xs(own)[len(old)] > old[-1]
    page = own.page_after(begin)
    found = [(f.event.job_id, f.event.sequence) for f in page.events]
    assert found == [(claimed.job_id, 1), (claimed.job_id, 2)]
    schema.require(own.database)
    assert facts(own.database) == after


def test_of_many_that_start_at_once_one_begins_the_incarnation(own: House) -> None:
    own.write(put_ahead)
    url = own.database.url.render_as_string(hide_password=False)
    starting = [connect(url) for _ in range(4)]

    def start(database: Database) -> Any:
        schema.require(database)
        return facts(database)

    found = together(*[partial(start, database) for database in starting])
    for database in starting:
        database.close()
    assert found == [facts(own.database)] * 4


def test_it_waits_for_whoever_counts_from_the_old_base(own: House) -> None:
    """What that one commits would lie below where watchers have begun by then."""
    own.write(put_ahead)
    latest = max(xs(own))
    inside, go = threading.Event(), threading.Event()
    late = new_job()

    def write(tx: Transaction) -> None:
        assert tx.x < latest
        inside.set()
        assert go.wait(WAIT_SECONDS_MAX)
        submit(tx, [late], {})

    def begin() -> Any:
        assert inside.wait(WAIT_SECONDS_MAX)
        schema.require(own.database)
        return own.page_after((0, late.job_id, 0))

    def release() -> None:
        assert inside.wait(WAIT_SECONDS_MAX)
        wait_until_blocked(own)
        go.set()

    _, page, _ = together(lambda: own.database.write(write), begin, release)
    assert late.job_id in {found.event.job_id for found in page.events}


def test_a_role_that_may_not_ask_for_the_cluster_finds_itself_at_home(own: House) -> None:
    before = facts(own.database)
    role = f"plain_{uuid4().hex}"
    url = own.database.url.update_query_dict({"options": f"-c role={role}"})
    with own.database.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.exec_driver_sql(f"CREATE ROLE {role}")
        try:
            connection.exec_driver_sql(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
            connection.exec_driver_sql("REVOKE EXECUTE ON FUNCTION pg_control_system FROM PUBLIC")
            database = connect(url.render_as_string(hide_password=False))
            schema.require(database)
            assert database.read(schema.home) == f"/{before.home.partition('/')[2]}"
            assert facts(database) == before
            database.write(put_ahead)
            schema.require(database)
            assert facts(database).incarnation != before.incarnation
            schema.require(own.database)
            assert facts(own.database) == facts(database)
            database.close()
        finally:
            connection.exec_driver_sql("GRANT EXECUTE ON FUNCTION pg_control_system TO PUBLIC")
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")


@pytest.mark.parametrize(
    ("stored", "here", "same"),
    [
        ("1/1/1", "1/1/1", True),
        ("1/1/1", "/1/1", True),
        ("/1/1", "1/1/1", True),
        ("1//1", "1/1/1", True),
        ("1/1/1", "2/1/1", False),
        ("1/1/1", "1/2/1", False),
        ("/1/1", "/1/2", False),
    ],
)
def test_what_one_of_two_roles_does_not_know_tells_nothing(
    stored: str, here: str, same: bool
) -> None:
    assert is_home(stored, here) is same
