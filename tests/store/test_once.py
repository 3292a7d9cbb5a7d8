"""`Database.once`: single statements on connections of their own."""

from __future__ import annotations

import threading
import traceback
from base64 import b64encode
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from jobsvc.store.database import CommitUnknown, Database, Refused, Transaction
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


def test_the_rows_come_as_the_driver_gives_them(database: Database) -> None:
    assert database.once(SUM, 1, 2) == [(3,)]
    assert database.once(SUM, 2, 3) == [(5,)]


def test_the_planner_has_no_say(database: Database) -> None:
    assert database.once(PLANNING) == [("force_generic_plan", "off", "off")]


def test_a_statement_is_prepared_once_a_connection_or_never(
    database: Database, pg_house: House
) -> None:
    for _ in range(3):
        database.once(SUM, 1, 2)
    names = [name for (name,) in database.once(PREPARED)]
    assert names == (["prepared", "sum"] if database.prepare else [])


def test_nothing_is_left_behind_for_a_transaction(database: Database) -> None:
    """A connection in autocommit would make each statement of the next one a commit."""
    database.once(SUM, 1, 2)
    with pytest.raises(ZeroDivisionError):
        database.write(
            lambda tx: [tx.execute(sa.text("INSERT INTO queues (name) VALUES ('q')")), 1 // 0]
        )
    count = sa.text("SELECT count(*) FROM queues WHERE name = 'q'")
    assert database.read(lambda c: c.execute(count).scalar_one()) == 0


COMMITS = "SELECT $1, current_setting('synchronous_commit')"


def test_only_what_is_not_durable_waits_for_no_disk(database: Database) -> None:
    hasty = Statement("hasty", ("int",), COMMITS, durable=False)
    patient = Statement("patient", ("int",), COMMITS)
    for _ in range(2):
        assert database.once(hasty, 1) == [(1, "off")]
        assert database.once(patient, 1) == [(1, "on")]


def test_what_it_refuses_is_the_callers(database: Database) -> None:
    with pytest.raises(Refused) as caught:
        database.once(Statement("division", ("int",), "SELECT 1 / $1"), 0)
    assert caught.value.sqlstate == "22012"
    assert database.once(SUM, 1, 2) == [(3,)]


def test_what_it_was_given_is_not_told(database: Database) -> None:
    """The driver quotes it."""
    parsed = Statement("parsed", ("text",), "SELECT $1::json")
    secret = b64encode(b"secret").decode()
    with pytest.raises(Refused) as caught:
        database.once(parsed, f'{{"result": "{secret}"')
    assert secret not in "".join(traceback.format_exception(caught.value))


def test_a_connection_that_died_in_the_pool_is_replaced(
    database: Database, pg_house: House
) -> None:
    ((before,),) = database.once(PID)
    end = sa.text("SELECT pg_terminate_backend(:pid, 5000)")
    pg_house.database.read(lambda c: c.execute(end, {"pid": before}).one())
    ((after,),) = database.once(PID)
    assert after != before


def test_a_connection_that_is_lost_meanwhile_leaves_the_outcome_unknown(
    pg_house: House, postgresql_url: str
) -> None:
    with Proxy(postgresql_url) as link:
        database = Database(link.url)
        database.once(PID)

        def cut_when_busy() -> None:
            wait_until_busy(pg_house)
            link.cut()

        cut = threading.Thread(target=cut_when_busy)
        cut.start()
        with pytest.raises(CommitUnknown):
            database.once(Statement("slow", (), "SELECT pg_sleep(20)"))
        cut.join()
        assert database.once(SUM, 1, 2) == [(3,)]
        database.close()


def wait_until_busy(house: House) -> None:
    """Until somebody sleeps in the database."""
    busy = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
    until(lambda: house.database.read(lambda c: c.execute(busy).scalar_one()), 10, "a sleeper")


def test_it_waits_for_a_locked_row_and_tries_again(database: Database, pg_house: House) -> None:
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
    assert database.once(LOCKED, job_id) == [(1,)]
    holder.join()
    assert done.is_set()
    assert pg_house.get(job_id).priority == 3
