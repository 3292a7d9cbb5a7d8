"""Transactions of others on the same cluster, beside whoever watches all jobs."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg2
import pytest
import sqlalchemy as sa

from jobsvc.core.attempts import Log
from jobsvc.core.model import JobFilter
from jobsvc.services import fleet as services
from jobsvc.services.fleet import Beat, Fleet
from jobsvc.services.threads import AsyncDatabase
from jobsvc.store import verbs
from jobsvc.store.database import Database
from jobsvc.store.reads.fleet import Page, page_after
from tests.services import PostgresNode, fresh_database, machine_bin, wheel_bin
from tests.store.conftest import open_database
from tests.store.house import WAIT_SECONDS_MAX, House
from tests.store.test_fleet import held, names, stored

LINE = Log("INFO", "line")
NUMBERED = "CREATE TABLE IF NOT EXISTS other (n int); INSERT INTO other VALUES (1)"


@contextmanager
def connected(url: sa.URL, **changes: Any) -> Iterator[Any]:
    """A session of its own that is in the middle of nothing yet."""
    plain = url.set(drivername="postgresql", **changes)
    connection = psycopg2.connect(plain.render_as_string(hide_password=False))
    try:
        yield connection.cursor()
    finally:
        connection.close()


@pytest.fixture
def elsewhere(pg_house: House) -> Iterator[str]:
    """The name of another database of the cluster."""
    url = pg_house.database.url.render_as_string(hide_password=False)
    with fresh_database(url) as other:
        yield other.rpartition("/")[2]


@pytest.fixture
def make_role(pg_house: House) -> Iterator[Callable[[str], str]]:
    """Roles that may do what they are granted, each with a schema of its own."""
    made: list[str] = []
    with connected(pg_house.database.url) as cursor:
        cursor.connection.autocommit = True

        def make(grant: str = "") -> str:
            name = f"role_{uuid4().hex}"
            cursor.execute(f"CREATE ROLE {name} LOGIN; CREATE SCHEMA AUTHORIZATION {name}")
            if grant:
                cursor.execute(grant.format(name))
            made.append(name)
            return name

        yield make
        for name in reversed(made):
            cursor.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def test_a_transaction_in_another_database_holds_up_nobody(pg_house: House, elsewhere: str) -> None:
    begin = pg_house.page_after(None)
    with connected(pg_house.database.url, database=elsewhere) as cursor:
        cursor.execute(NUMBERED)
        cursor.execute("SAVEPOINT s; INSERT INTO other VALUES (2); RELEASE s; SAVEPOINT t")
        cursor.execute("INSERT INTO other VALUES (3)")
        job_id = pg_house.submit()
        assert names(pg_house.page_after(begin.end, hidden=True)) == []
        page = pg_house.page_after(begin.end, apart=True)
        assert names(page) == [(job_id, 1)]
        assert page.passed_over
        assert page.end[0] <= page.following


def test_a_role_that_may_write_no_event_holds_up_nobody(
    pg_house: House, make_role: Callable[[str], str]
) -> None:
    begin = pg_house.page_after(None)
    with connected(pg_house.database.url, username=make_role("")) as cursor:
        cursor.execute(NUMBERED)
        job_id = pg_house.submit()
        assert names(pg_house.page_after(begin.end, hidden=True)) == []
        assert names(pg_house.page_after(begin.end, apart=True)) == [(job_id, 1)]


@pytest.mark.parametrize(
    "grant",
    [
        "GRANT INSERT ON job_events TO {}",
        "GRANT INSERT (x) ON job_events TO {}",
        "ALTER ROLE {} SUPERUSER",
    ],
)
def test_a_role_that_may_write_events_is_waited_for(
    pg_house: House, make_role: Callable[[str], str], grant: str
) -> None:
    begin = pg_house.page_after(None)
    assert is_waited_for(pg_house, begin, make_role(grant))


def test_a_role_that_may_become_one_that_may_write_events_is_waited_for(
    pg_house: House, make_role: Callable[[str], str]
) -> None:
    """By SET ROLE alone, as it inherits nothing."""
    begin = pg_house.page_after(None)
    writer = make_role("GRANT INSERT ON job_events TO {}")
    member = make_role(f"ALTER ROLE {{0}} NOINHERIT; GRANT {writer} TO {{0}}")
    assert is_waited_for(pg_house, begin, member)


def is_waited_for(house: House, begin: Page, role: str) -> bool:
    with connected(house.database.url, username=role) as cursor:
        cursor.execute("SELECT pg_current_xact_id()")
        house.submit()
        page = house.page_after(begin.end, hidden=True, apart=True)
    return page.hidden and not page.events


def test_one_of_ours_is_waited_for_whoever_else_is_passed_over(
    pg_house: House, elsewhere: str
) -> None:
    begin = pg_house.page_after(None)
    with connected(pg_house.database.url, database=elsewhere) as cursor:
        cursor.execute(NUMBERED)
        first = pg_house.submit()
        with held(pg_house, lambda tx: tx.x) as ours:
            second = pg_house.submit()
            page = pg_house.page_after(begin.end, hidden=True, apart=True)
            assert names(page) == [(first, 1)]
            assert page.hidden
            ours.commit()
        assert names(pg_house.page_after(page.end, apart=True)) == [(second, 1)]


def test_an_ordinary_role_sees_who_is_foreign(
    pg_house: House, elsewhere: str, make_role: Callable[[str], str]
) -> None:
    begin = pg_house.page_after(None)
    reader = make_role("GRANT SELECT ON jobs, job_events, service TO {}")
    database = Database(pg_house.database.url.set(username=reader))
    try:
        with connected(pg_house.database.url, database=elsewhere) as cursor:
            cursor.execute(NUMBERED)
            job_id = pg_house.submit()
            page = database.read(lambda c: page_after(c, begin.end, 10, apart=True))
    finally:
        database.close()
    assert names(page) == [(job_id, 1)]


def test_who_may_not_ask_waits_as_before(
    pg_house: House, elsewhere: str, make_role: Callable[[str], str]
) -> None:
    begin = pg_house.page_after(None)
    reader = make_role("GRANT SELECT ON jobs, job_events, service TO {}")
    database = Database(pg_house.database.url.set(username=reader))
    privilege = "SELECT ON pg_catalog.pg_prepared_xacts"
    try:
        with connected(pg_house.database.url) as owner:
            owner.execute(f"REVOKE {privilege} FROM PUBLIC; COMMIT")
            with connected(pg_house.database.url, database=elsewhere) as cursor:
                cursor.execute(NUMBERED)
                pg_house.submit()
                page = database.read(lambda c: page_after(c, begin.end, 10, apart=True))
            owner.execute(f"GRANT {privilege} TO PUBLIC; COMMIT")
    finally:
        database.close()
    assert names(page) == []
    assert page.hidden


@pytest.mark.parametrize("binaries", [machine_bin, wheel_bin])
def test_prepared_transactions(binaries: Callable[[], Path | None]) -> None:
    """They have no session, and outlive a restart."""
    found = binaries()
    assert found is not None
    with PostgresNode(found, settings={"max_prepared_transactions": "5"}) as node:
        database = open_database(node.url)
        house = House(database)
        begin = house.page_after(None)
        with fresh_database(node.url) as other:
            name = other.rpartition("/")[2]
            with connected(database.url, database=name) as cursor:
                cursor.execute(f"{NUMBERED}; PREPARE TRANSACTION 'foreign'")
            job_id = house.submit()
            node.kill()
            node.start()
            assert names(house.page_after(begin.end, hidden=True)) == []
            page = house.page_after(begin.end, apart=True)
            assert names(page) == [(job_id, 1)]
            with connected(database.url) as cursor:
                cursor.execute("CREATE TABLE own (n int); PREPARE TRANSACTION 'own'")
            later = house.submit()
            assert names(house.page_after(page.end, hidden=True, apart=True)) == []
            with connected(database.url) as cursor:
                cursor.connection.autocommit = True
                cursor.execute("ROLLBACK PREPARED 'own'")
            assert names(house.page_after(page.end, apart=True)) == [(later, 1)]
            with connected(database.url, database=name) as cursor:
                cursor.connection.autocommit = True
                cursor.execute("ROLLBACK PREPARED 'foreign'")
        database.close()


@pytest.mark.parametrize("seed", range(2))
def test_a_reader_beside_many_of_ours_and_many_others_misses_nothing(
    pg_house: House, elsewhere: str, seed: int
) -> None:
    house = pg_house
    claimed = house.claim_all([house.submit() for _ in range(4)])
    position = house.page_after(None).end
    before = stored(house)
    stop = threading.Event()
    seen = []

    def write(number: int) -> None:
        chance = random.Random(100 * seed + number)
        for _ in range(25):
            some = chance.sample(claimed, chance.randint(1, 3))
            reports = {c.job_id: (c.token, [LINE] * chance.randint(1, 2)) for c in some}
            house.database.write(lambda tx, given=reports: verbs.report(tx, given))  # type: ignore[misc]

    def disturb() -> None:
        while not stop.is_set():
            with connected(house.database.url, database=elsewhere) as cursor:
                for _ in range(20):
                    cursor.execute("SELECT pg_current_xact_id()")
                    stop.wait(0.002)
                    cursor.connection.rollback()

    def read() -> None:
        nonlocal position
        while not stop.is_set():
            page = house.page_after(position, 1000, hidden=True, apart=True)
            seen.extend(names(page))
            position = max(position, page.end)

    with ThreadPoolExecutor(7) as pool:
        others = [pool.submit(read), pool.submit(disturb), pool.submit(disturb)]
        for writing in [pool.submit(write, n) for n in range(4)]:
            writing.result(WAIT_SECONDS_MAX)
        stop.set()
        for other in others:
            other.result(WAIT_SECONDS_MAX)
    seen += names(house.page_after(position))
    assert len(seen) == len(set(seen))
    assert set(seen) == stored(house) - before


@pytest.fixture
async def servers(
    pg_house: House, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Fleet, Fleet]]:
    monkeypatch.setattr(services, "ASK_SECONDS", 0.02)
    monkeypatch.setattr(services, "BEGIN_SECONDS_MAX", WAIT_SECONDS_MAX)
    threads = AsyncDatabase(pg_house.database, 4)
    made = [Fleet(pg_house.database, threads, 0.1, timedelta(hours=24)) for _ in range(2)]
    for fleet in made:
        fleet.start()
    yield made[0], made[1]
    for fleet in made:
        await fleet.stop()
    threads.close()


async def test_watchers_are_told_while_somebody_else_has_a_write_open(
    servers: tuple[Fleet, Fleet], pg_house: House, elsewhere: str
) -> None:
    """And go on from there on a server that does not know yet who is foreign."""
    house = pg_house
    first, second = servers
    with connected(house.database.url, database=elsewhere) as cursor:
        cursor.execute(NUMBERED)
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            stream = first.watch(JobFilter(), None, 3600.0)
            assert isinstance(await anext(stream), Beat)
            ids = [house.submit() for _ in range(3)]
            told = [await anext(stream) for _ in ids]
            assert not any(isinstance(each, Beat) for each in told)
            assert [each.found.job_id for each in told] == ids  # type: ignore[union-attr]
            assert not first.held_seconds
            later = house.submit()
            resumed = second.watch(JobFilter(), told[-1].mark, 3600.0)
            assert isinstance(await anext(resumed), Beat)
            assert (await anext(resumed)).found.job_id == later  # type: ignore[union-attr]
        await stream.aclose()
        await resumed.aclose()
