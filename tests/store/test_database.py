"""Transactions when the database, or the way to it, fails."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from jobsvc.errors import DatabaseUnavailable
from jobsvc.store.database import CommitUnknown, Database, Transaction
from jobsvc.store.dialects.clock import clock
from jobsvc.store.tables import jobs, queues
from tests.services import free_port
from tests.store.conftest import connect, sqlite_url
from tests.store.house import WAIT_SECONDS_MAX, House, together


@pytest.fixture
def hasty(pg_house: House) -> Iterator[Database]:
    """PostgreSQL with a short wait for locks, so that tests need not wait long either."""
    url = pg_house.database.url.update_query_dict({"options": "-c lock_timeout=50ms"})
    database = Database(url.render_as_string(hide_password=False), pool_size=2)
    yield database
    database.close()


def add_queue(tx: Transaction, name: str) -> None:
    tx.execute(sa.insert(queues), {"name": name})


def names(database: Database) -> set[str]:
    return set(database.read(lambda c: c.execute(sa.select(queues.c.name)).scalars().all()))


def pid(connection: sa.Connection) -> int:
    return int(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())


def terminate(by: Database, victim: int) -> None:
    """Ends a backend; returns once it is gone."""
    statement = sa.text("SELECT pg_terminate_backend(:pid, 10000)").bindparams(pid=victim)
    assert by.read(lambda c: c.execute(statement).scalar_one())


# What every database promises.


def test_what_was_written_is_committed(house: House) -> None:
    house.write(lambda tx: add_queue(tx, "q"))
    assert names(house.database) == {"q"}


def test_an_error_of_the_body_rolls_back_and_passes_through(house: House) -> None:
    class Refused(Exception):
        pass

    def body(tx: Transaction) -> None:
        add_queue(tx, "q")
        raise Refused

    with pytest.raises(Refused):
        house.write(body)
    assert names(house.database) == set()


def test_an_error_of_a_statement_is_not_called_unavailable(house: House) -> None:
    calls: list[int] = []

    def body(tx: Transaction) -> None:
        calls.append(1)
        add_queue(tx, "q")
        add_queue(tx, "q")

    with pytest.raises(sa.exc.IntegrityError):
        house.write(body)
    assert len(calls) == 1
    assert names(house.database) == set()


def test_the_clock_is_the_databases_in_utc_and_moves(house: House) -> None:
    first, second = house.write(lambda tx: tx.now), house.database.read(clock)
    assert first.tzinfo is second.tzinfo is UTC
    assert first < second < first + timedelta(minutes=1)
    assert abs(first - datetime.now(UTC)) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("state", "DONE"),
        ("state", "SUCCEEDED"),  # without a finish_time
        ("lease_token", None),  # of a running job
        ("next_attempt_time", datetime(2030, 1, 1, tzinfo=UTC)),  # of one that does not retry
        ("finish_time", datetime(2030, 1, 1, tzinfo=UTC)),  # of one that has not ended
    ],
)
def test_the_tables_refuse_a_row_that_contradicts_itself(
    house: House, column: str, value: object
) -> None:
    claimed = house.start()
    with pytest.raises(sa.exc.IntegrityError, match="ck_jobs_"):
        house.change(claimed.job_id, **{column: value})


def test_times_are_kept_to_the_microsecond(house: House) -> None:
    job_id = house.submit()
    for time in (
        datetime(1999, 12, 31, 23, 59, 59, 999_999, UTC),
        datetime(2100, 1, 1, 0, 0, 0, 1, UTC),
    ):
        house.change(job_id, dispatch_time=time)
        assert house.row(job_id).dispatch_time == time


# PostgreSQL.


def test_a_deadlock_is_tried_again(pg_house: House) -> None:
    house = pg_house
    for name in ("a", "b"):
        house.write(lambda tx, name=name: add_queue(tx, name))  # type: ignore[misc]
    both_hold_one = threading.Barrier(2)
    runs: list[str] = []

    def body(tx: Transaction, first: str, second: str) -> None:
        tx.execute(sa.text("SET LOCAL deadlock_timeout = '20ms'"))
        runs.append(first)
        for name in (first, second):
            increment = sa.update(queues).values(generation=queues.c.generation + 1)
            tx.execute(increment.where(queues.c.name == name))
            if name == first and runs.count(first) == 1:
                both_hold_one.wait(WAIT_SECONDS_MAX)

    together(
        lambda: house.write(lambda tx: body(tx, "a", "b")),
        lambda: house.write(lambda tx: body(tx, "b", "a")),
    )
    assert len(runs) == 3
    generations = house.database.read(lambda c: c.execute(sa.select(queues.c.generation))).scalars()
    assert list(generations) == [3, 3]


def test_a_row_that_stays_locked_is_unavailable_in_the_end(
    pg_house: House, hasty: Database
) -> None:
    job_id = pg_house.submit()
    runs: list[int] = []

    def wants_it(tx: Transaction) -> None:
        runs.append(1)
        tx.execute(sa.update(jobs).where(jobs.c.id == job_id).values(priority=1))

    def holds_it(tx: Transaction) -> None:
        tx.execute(sa.select(jobs.c.id).where(jobs.c.id == job_id).with_for_update())
        with pytest.raises(DatabaseUnavailable):
            hasty.write(wants_it)

    pg_house.write(holds_it)
    assert len(runs) == 4
    assert pg_house.get(job_id).priority == 0
    hasty.write(wants_it)


def test_a_connection_that_died_in_the_pool_is_replaced(pg_house: House) -> None:
    database = pg_house.database
    uses: list[Callable[[], int]] = [
        lambda: database.write(lambda tx: pid(tx.connection)),
        lambda: database.read(pid),
    ]
    for use in uses:
        before = use()
        other = connect(database.url.render_as_string(hide_password=False))
        terminate(other, before)
        other.close()
        assert use() != before


def test_a_connection_that_dies_in_the_body_is_replaced_once(pg_house: House) -> None:
    database = pg_house.database
    runs: list[int] = []

    def dies(tx: Transaction, times: int) -> None:
        add_queue(tx, f"q{times}")
        runs.append(1)
        if len(runs) <= times:
            terminate(database, pid(tx.connection))
        tx.execute(sa.text("SELECT 1"))

    database.write(lambda tx: dies(tx, 1))
    assert len(runs) == 2
    assert names(database) == {"q1"}
    runs.clear()
    with pytest.raises(DatabaseUnavailable) as caught:
        database.write(lambda tx: dies(tx, 2))
    assert type(caught.value) is DatabaseUnavailable
    assert len(runs) == 2
    assert names(database) == {"q1"}


def test_a_connection_that_dies_in_commit_leaves_the_outcome_unknown(pg_house: House) -> None:
    """Never tried again: it may have been committed."""
    runs: list[int] = []

    def dies_last(tx: Transaction) -> None:
        runs.append(1)
        add_queue(tx, "q")
        terminate(pg_house.database, pid(tx.connection))

    with pytest.raises(CommitUnknown):
        pg_house.database.write(dies_last)
    assert len(runs) == 1
    assert names(pg_house.database) == set()  # this time it was not


def test_a_database_that_takes_no_writes_any_more_is_left(pg_house: House) -> None:
    """As after a failover: a demoted primary still answers, so each connection to it is suspect."""
    database = pg_house.database
    before = database.read(pid)
    runs: list[int] = []

    def demoted(tx: Transaction) -> None:
        runs.append(1)
        tx.execute(sa.text("SET TRANSACTION READ ONLY"))
        add_queue(tx, "q")

    with pytest.raises(DatabaseUnavailable):
        database.write(demoted)
    assert len(runs) == 1
    assert database.read(pid) != before


def test_a_read_is_one_statement(pg_house: House) -> None:
    """Nothing is set before or behind it, whatever the connection was used for."""
    url = pg_house.database.url.render_as_string(hide_password=False)
    with closing(Database(url, pool_size=1)) as database:
        last = sa.text("SELECT query FROM pg_stat_activity WHERE pid = :pid")
        for use in (database.read, database.scan, database.read):
            use(pid)
            served_by = database.read(pid)
            found = pg_house.database.read(
                lambda c, p=served_by: c.execute(last, {"pid": p}).scalar_one()  # type: ignore[misc]
            )
            assert "pg_backend_pid" in found


def test_a_standby_is_not_connected_to(pg_house: House) -> None:
    name = pg_house.database.url.database

    def set_read_only(value: str) -> None:
        statement = f"ALTER DATABASE {name} SET default_transaction_read_only = {value}"
        with pg_house.database.engine.connect() as connection:
            connection.exec_driver_sql("SET TRANSACTION READ WRITE")
            connection.exec_driver_sql(statement)
            connection.commit()

    fresh = connect(pg_house.database.url.render_as_string(hide_password=False))
    pg_house.write(lambda tx: add_queue(tx, "q"))
    set_read_only("on")
    try:
        with pytest.raises(DatabaseUnavailable):
            fresh.write(lambda tx: add_queue(tx, "r"))
        with pytest.raises(DatabaseUnavailable):
            fresh.read(lambda c: c.execute(sa.select(queues)))
    finally:
        set_read_only("off")
    fresh.write(lambda tx: add_queue(tx, "r"))
    fresh.close()


def test_a_statement_that_takes_too_long_is_unavailable(pg_house: House) -> None:
    def slow(tx: Transaction) -> None:
        tx.execute(sa.text("SET LOCAL statement_timeout = '20ms'"))
        tx.execute(sa.text("SELECT pg_sleep(10)"))

    with pytest.raises(DatabaseUnavailable):
        pg_house.write(slow)


def test_time_limits_are_set_on_every_connection(pg_house: House) -> None:
    def show(setting: str) -> str:
        return str(
            pg_house.database.read(lambda c: c.exec_driver_sql(f"SHOW {setting}").scalar_one())
        )

    assert show("statement_timeout") == "5s"
    assert show("lock_timeout") == "1s"
    assert show("idle_in_transaction_session_timeout") == "10s"
    assert show("synchronous_commit") == "on"


def test_with_nothing_there_the_database_is_unavailable() -> None:
    database = Database(f"postgresql+psycopg2://postgres@127.0.0.1:{free_port()}/postgres")
    with pytest.raises(DatabaseUnavailable) as caught:
        database.write(lambda tx: tx.now)
    assert not isinstance(caught.value, CommitUnknown)
    with pytest.raises(DatabaseUnavailable):
        database.read(clock)
    database.close()


def test_with_every_connection_in_use_the_database_is_unavailable(
    pg_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(pg_house.database.url.render_as_string(hide_password=False), pool_size=1)
    monkeypatch.setattr(database.engine.pool, "_timeout", 0.05)

    def greedy(tx: Transaction) -> None:
        with pytest.raises(DatabaseUnavailable):
            database.write(lambda tx: tx.now)
        with pytest.raises(DatabaseUnavailable):
            database.read(clock)

    database.write(greedy)
    assert database.read(clock) > pg_house.now() - timedelta(minutes=1)
    database.close()


# SQLite.

LOCK_IT = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.readline()
"""


def impatient(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA busy_timeout=20")


@pytest.fixture
def locked(sqlite_house: House) -> Iterator[House]:
    """SQLite that another process has locked, with little patience."""
    database = sqlite_house.database
    sa.event.listen(database.engine, "connect", impatient)
    path = str(database.url.database)
    with subprocess.Popen(
        [sys.executable, "-c", LOCK_IT, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield sqlite_house
        process.communicate("", timeout=WAIT_SECONDS_MAX)


def test_a_database_that_another_process_locks_is_unavailable_to_writers(locked: House) -> None:
    with pytest.raises(DatabaseUnavailable):
        locked.write(lambda tx: add_queue(tx, "q"))
    assert names(locked.database) == set()  # readers go on


def test_many_may_open_a_new_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite refuses at once what comes while another changes the file's mode."""
    other = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr("time.sleep", lambda seconds: other.execute("COMMIT"))
    database = Database(sqlite_url(tmp_path))
    mode = database.read(lambda c: c.exec_driver_sql("PRAGMA journal_mode").scalar_one())
    assert mode == "wal"
    assert not other.in_transaction
    database.close()
    other.close()


def test_a_writer_has_the_database_from_its_first_read(sqlite_house: House) -> None:
    """Else what it read could be outdated once it writes, and SQLite would refuse that."""
    other = connect(str(sqlite_house.database.url))
    sa.event.listen(other.engine, "connect", impatient)

    def reads_and_writes(tx: Transaction) -> None:
        with pytest.raises(DatabaseUnavailable):
            other.write(lambda tx: add_queue(tx, "q"))
        add_queue(tx, "q")

    sqlite_house.write(reads_and_writes)
    assert names(other) == {"q"}
    other.close()


def test_a_directory_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path / "missing"))
    with pytest.raises(DatabaseUnavailable):
        database.write(lambda tx: tx.now)
    database.close()


def test_a_commit_to_sqlite_survives_a_power_cut(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path))
    found = {
        pragma: database.read(
            lambda c, p=pragma: c.exec_driver_sql(f"PRAGMA {p}").scalar_one()  # type: ignore[misc]
        )
        for pragma in ("journal_mode", "synchronous")
    }
    assert found == {"journal_mode": "wal", "synchronous": 2}
    database.close()
