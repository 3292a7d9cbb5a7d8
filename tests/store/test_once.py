"""Single statements on connections of their own: `Database.once`, and the event loop's."""

from __future__ import annotations

import asyncio
import threading
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest
import sqlalchemy as sa

from jobsvc.errors import DatabaseUnavailable
from jobsvc.store import aio
from jobsvc.store.aio import LOOP_CONNECTIONS, AsyncStatements
from jobsvc.store.database import CommitUnknown, Database, Refused, Transaction
from jobsvc.store.dialects import sockets
from jobsvc.store.dialects.prepared import Statement
from jobsvc.store.tables import jobs
from tests.harness import until
from tests.harness.proxy import Proxy
from tests.store.house import House, wait_until_blocked

PID = Statement("pid", (), "SELECT pg_backend_pid()")
SUM = Statement("sum", ("int", "int"), "SELECT $1 + $2")
PREPARED = Statement("prepared", (), "SELECT name FROM pg_prepared_statements ORDER BY name")
PLANNING = Statement(
    "planning",
    (),
    "SELECT current_setting('plan_cache_mode'), current_setting('enable_hashjoin'), "
    "current_setting('jit')",
)
LOCKED = Statement("locked", ("uuid",), "UPDATE jobs SET priority = 3 WHERE id = $1 RETURNING 1")


@pytest.fixture(params=[True, False], ids=["prepared", "in full"])
def database(pg_house: House, request: pytest.FixtureRequest) -> Iterator[Database]:
    url = pg_house.database.url.render_as_string(hide_password=False)
    made = Database(url, pool_size=2, prepare=request.param)
    yield made
    made.close()


Once = Callable[..., list[tuple[Any, ...]]]


@contextmanager
def by_loop(database: Database) -> Iterator[Once]:
    with asyncio.Runner() as runner:
        statements = AsyncStatements(database, asyncio.to_thread)
        yield lambda *asked: runner.run(statements.once(*asked))
        runner.get_loop().call_soon(statements.close)
        runner.run(asyncio.sleep(0))


@contextmanager
def by_thread(database: Database) -> Iterator[Once]:
    yield database.once


WAYS = pytest.mark.parametrize("way", [by_thread, by_loop])


@pytest.fixture(params=[by_thread, by_loop])
def once(database: Database, request: pytest.FixtureRequest) -> Iterator[Once]:
    with request.param(database) as once:
        yield once


def test_the_rows_come_as_the_driver_gives_them(once: Once) -> None:
    assert once(SUM, 1, 2) == [(3,)]
    assert once(SUM, 2, 3) == [(5,)]


def test_the_planner_has_no_say(once: Once) -> None:
    assert once(PLANNING) == [("force_generic_plan", "off", "off")]


def test_a_statement_is_prepared_once_a_connection_or_never(
    once: Once, database: Database, pg_house: House
) -> None:
    for _ in range(3):
        once(SUM, 1, 2)
    names = [name for (name,) in once(PREPARED)]
    assert names == (["prepared", "sum"] if database.prepare else [])


def test_nothing_is_left_behind_for_a_transaction(once: Once, database: Database) -> None:
    """A connection in autocommit would make each statement of the next one a commit."""
    once(SUM, 1, 2)
    with pytest.raises(ZeroDivisionError):
        database.write(
            lambda tx: [tx.execute(sa.text("INSERT INTO queues (name) VALUES ('q')")), 1 // 0]
        )
    count = sa.text("SELECT count(*) FROM queues WHERE name = 'q'")
    assert database.read(lambda c: c.execute(count).scalar_one()) == 0


COMMITS = "SELECT $1, current_setting('synchronous_commit')"


def test_only_what_is_not_durable_waits_for_no_disk(once: Once) -> None:
    hasty = Statement("hasty", ("int",), COMMITS, durable=False)
    patient = Statement("patient", ("int",), COMMITS)
    for _ in range(2):
        assert once(hasty, 1) == [(1, "off")]
        assert once(patient, 1) == [(1, "on")]


def test_what_it_refuses_is_the_callers(once: Once) -> None:
    with pytest.raises(Refused) as caught:
        once(Statement("division", ("int",), "SELECT 1 / $1"), 0)
    assert caught.value.sqlstate == "22012"
    assert once(SUM, 1, 2) == [(3,)]


def test_what_it_was_given_is_not_told(once: Once) -> None:
    """The driver quotes it."""
    parsed = Statement("parsed", ("text",), "SELECT $1::json")
    secret = b64encode(b"secret").decode()
    with pytest.raises(Refused) as caught:
        once(parsed, f'{{"result": "{secret}"')
    assert secret not in "".join(traceback.format_exception(caught.value))


def test_a_connection_that_died_in_the_pool_is_replaced(
    once: Once, database: Database, pg_house: House
) -> None:
    ((before,),) = once(PID)
    end = sa.text("SELECT pg_terminate_backend(:pid, 5000)")
    pg_house.database.read(lambda c: c.execute(end, {"pid": before}).one())
    ((after,),) = once(PID)
    assert after != before


@WAYS
def test_a_connection_that_is_lost_meanwhile_leaves_the_outcome_unknown(
    pg_house: House, postgresql_url: str, way: Any
) -> None:
    with Proxy(postgresql_url) as link, closing(Database(link.url)) as database:

        def cut_when_busy() -> None:
            wait_until_busy(pg_house)
            link.cut()

        with way(database) as once:
            once(PID)
            cut = threading.Thread(target=cut_when_busy)
            cut.start()
            with pytest.raises(CommitUnknown):
                once(Statement("slow", (), "SELECT pg_sleep(20)"))
            cut.join()
            assert once(SUM, 1, 2) == [(3,)]


def wait_until_busy(house: House) -> None:
    """Until somebody sleeps in the database."""
    busy = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
    until(lambda: house.database.read(lambda c: c.execute(busy).scalar_one()), 10, "a sleeper")


def test_it_waits_for_a_locked_row_and_tries_again(once: Once, pg_house: House) -> None:
    job_id = pg_house.submit()
    locked, done = threading.Event(), threading.Event()

    def hold() -> None:
        def body(tx: Transaction) -> None:
            tx.execute(sa.select(jobs.c.id).where(jobs.c.id == job_id).with_for_update())
            locked.set()
            wait_until_blocked(pg_house)

        pg_house.write(body)
        done.set()

    holder = threading.Thread(target=hold)
    holder.start()
    assert locked.wait(10)
    assert once(LOCKED, job_id) == [(1,)]
    holder.join()
    assert done.is_set()
    assert pg_house.get(job_id).priority == 3


# By the loop.


def test_the_loop_serves_others_meanwhile(database: Database, pg_house: House) -> None:
    async def run() -> list[str]:
        statements = AsyncStatements(database, asyncio.to_thread)
        ended: list[str] = []

        async def ask(name: str, seconds: float) -> None:
            await statements.once(Statement("nap", ("float8",), "SELECT pg_sleep($1)"), seconds)
            ended.append(name)

        slow = [asyncio.create_task(ask("slow", 2.0)) for _ in range(LOOP_CONNECTIONS - 1)]
        await ask("quick", 0.0)
        await ask("quick", 0.0)
        await asyncio.gather(*slow)
        statements.close()
        return ended

    assert asyncio.run(run()) == ["quick"] * 2 + ["slow"] * (LOOP_CONNECTIONS - 1)


def test_a_silent_server_is_given_up(
    pg_house: House, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "SILENCE_SECONDS_MAX", 0.3)
    with (
        Proxy(postgresql_url) as link,
        closing(Database(link.url)) as database,
        by_loop(database) as once,
    ):
        once(PID)
        with link.silence(), pytest.raises(CommitUnknown):
            once(PID)


def test_a_host_that_is_silent_is_passed_over(postgresql_url: str) -> None:
    """As after a failover, where the first of two is gone without a word."""
    real = sa.make_url(postgresql_url)
    with Proxy(postgresql_url) as link, link.silence():
        silent = sa.make_url(link.url)
        hosts = [f"{url.host}:{url.port}" for url in (silent, real)]
        both = real.set(host=None, port=None, query={"host": hosts, "connect_timeout": "2"})
        url = both.render_as_string(hide_password=False)
        with closing(Database(url)) as database, by_loop(database) as once:
            assert once(SUM, 1, 2) == [(3,)]


def test_a_server_that_is_silent_from_the_start_is_given_up(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its port takes connections."""
    with Proxy(postgresql_url) as link, link.silence():
        url = f"{link.url}?connect_timeout=2"
        with closing(Database(url)) as database, by_loop(database) as once:
            with pytest.raises(DatabaseUnavailable):
                once(PID)
            monkeypatch.setattr(aio, "_place", lambda _: {})  # it falls silent after that
            monkeypatch.setattr(sockets, "SILENCE_SECONDS_MAX", 0.3)
            with pytest.raises(DatabaseUnavailable):
                once(PID)


def test_a_cancelled_caller_leaves_no_answer_for_the_next(database: Database) -> None:
    async def run() -> list[tuple[Any, ...]]:
        statements = AsyncStatements(database, asyncio.to_thread)
        nap = Statement("nap", (), "SELECT 7 FROM pg_sleep(0.2)")
        for _ in range(LOOP_CONNECTIONS + 1):
            with suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await statements.once(nap)
        rows = await statements.once(SUM, 1, 2)
        statements.close()
        return rows

    assert asyncio.run(run()) == [(3,)]


def test_nothing_is_kept_of_a_database_that_takes_no_writes_any_more(pg_house: House) -> None:
    """A demoted primary still answers."""
    refuse = (
        "CREATE OR REPLACE FUNCTION pg_temp.refuse() RETURNS int LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'read-only' USING ERRCODE = '25006'; END $$"
    )
    writes = Statement("writes", (), "SELECT pg_temp.refuse()")
    prepare = Statement("prepare", (), "SELECT 1")
    prepare.__dict__["prepare"] = f"{refuse}; {prepare.prepare}"
    with by_loop(pg_house.database) as once:
        once(prepare)
        ((before,),) = once(PID)
        with pytest.raises(DatabaseUnavailable):
            once(writes)
        ((after,),) = once(PID)
    assert after != before
