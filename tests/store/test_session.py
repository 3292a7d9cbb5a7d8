"""Sessions are what the service relies on, whatever the database, the role or the URL says."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy as sa
import structlog

from jobsvc.core.model import Unique
from jobsvc.errors import CannotStart, DatabaseUnavailable, DatabaseUnfit
from jobsvc.store import hot, migrating, schema, trouble, verbs
from jobsvc.store.aio import AsyncStatements
from jobsvc.store.database import Database, Transaction
from jobsvc.store.dialects import engines
from jobsvc.store.dialects.engines import SESSION
from jobsvc.store.dialects.prepared import Statement
from jobsvc.store.tables import jobs
from jobsvc.store.verbs import Submitted
from tests.services import free_port, fresh_database
from tests.store.conftest import connect, open_database
from tests.store.house import WAIT_SECONDS_MAX, House, new_job, together, wait_until_blocked

HOSTILE = {
    "default_transaction_isolation": "repeatable read",
    "client_encoding": "LATIN1",
    "timezone": "Asia/Kolkata",
    "datestyle": "German",
    "intervalstyle": "sql_standard",
    "standard_conforming_strings": "off",
    "extra_float_digits": "-15",
    "array_nulls": "off",
    "transform_null_equals": "on",
    "synchronous_commit": "off",
    "lock_timeout": "0",
}
ASKED = (*SESSION, "client_encoding", "transaction_isolation", "synchronous_commit")
TOLD = {
    **SESSION,
    "client_encoding": "UTF8",
    "transaction_isolation": "read committed",
    "synchronous_commit": "on",
}
SHOW = "SELECT " + ", ".join(f"current_setting('{name}')" for name in ASKED)


def execute(url: str, *statements: str) -> None:
    connection = psycopg2.connect(url.replace("+psycopg2", "", 1))
    connection.autocommit = True
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
    connection.close()


@pytest.fixture
def hostile_url(database_url: str) -> str:
    name = database_url.rpartition("/")[2]
    settings = HOSTILE.items()
    execute(database_url, *(f"ALTER DATABASE {name} SET {s} = '{v}'" for s, v in settings))
    return database_url


@pytest.fixture(params=[True, False], ids=["prepare", "in_full"])
def hostile(hostile_url: str, request: pytest.FixtureRequest) -> Iterator[Database]:
    database = Database(hostile_url + "?options=-c%20timezone%3DCET", prepare=request.param)
    migrating.migrate(database)
    yield database
    database.close()


def test_each_session_states_what_it_relies_on(hostile: Database) -> None:
    def show(tx: Transaction) -> object:
        return tx.connection.exec_driver_sql(SHOW).one()

    by_a_transaction = hostile.write(show)
    by_a_read = hostile.read(lambda c: c.exec_driver_sql(SHOW).one())
    (by_itself,) = hostile.once(Statement("show", (), SHOW))

    async def by_a_loop() -> object:
        statements = AsyncStatements(hostile, asyncio.to_thread)
        try:
            return (await statements.once(Statement("show", (), SHOW)))[0]
        finally:
            statements.close()

    for told in (by_a_transaction, by_a_read, by_itself, asyncio.run(by_a_loop())):
        assert dict(zip(ASKED, told, strict=True)) == TOLD  # type: ignore[call-overload]


def test_what_the_url_may_have_otherwise_it_has(database_url: str) -> None:
    database = Database(database_url + "?options=-c%20lock_timeout%3D50ms&connect_timeout=9")
    found = database.read(
        lambda c: c.exec_driver_sql(
            "SELECT current_setting('lock_timeout'), current_setting('statement_timeout')"
        ).one()
    )
    assert tuple(found) == ("50ms", "5s")
    database.close()


def test_texts_of_any_kind_are_kept_whatever_the_database_says_of_its_clients(
    hostile: Database,
) -> None:
    house = House(hostile)
    text = "größer als 10 € \\ '日本' 🙂"
    job_id = house.submit(labels={"k": text})
    assert house.get(job_id).labels == {"k": text}


def test_a_unique_key_has_one_job_whatever_the_isolation_of_the_database(hostile_url: str) -> None:
    """Whoever waits for the name reads what its holder has left, and not what was before."""
    first, second = House(open_database(hostile_url)), House(connect(hostile_url))
    holds = threading.Event()

    def submit_slowly() -> None:
        def body(tx: Transaction) -> None:
            verbs.submit(tx, [new_job(unique=Unique("order-17"))], {})
            holds.set()
            wait_until_blocked(first)

        first.write(body)

    def submit_too() -> None:
        assert holds.wait(WAIT_SECONDS_MAX)
        (answer,) = second.submit_all([new_job(unique=Unique("order-17"))])
        assert isinstance(answer, Submitted)
        assert answer.already_existed

    together(submit_slowly, submit_too)
    assert first.count(jobs) == 1
    first.database.close()
    second.database.close()


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_hold_every_text_is_refused(
    postgres_url: str, encoding: str
) -> None:
    with fresh_database(postgres_url, f"template0 ENCODING '{encoding}' LOCALE 'C'") as url:
        database = Database(url)
        for start in (migrating.migrate, schema.require):
            with pytest.raises(DatabaseUnfit, match=f"encoding {encoding}.*ENCODING 'UTF8'"):
                start(database)
        database.close()


def test_a_session_that_is_not_as_asked_for_is_refused(database_url: str) -> None:
    """As behind a pooler that keeps the session's options to itself."""
    database = Database(database_url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "SESSION", {**SESSION, "extra_float_digits": "2"})
        with pytest.raises(DatabaseUnfit, match=r"extra_float_digits = 1.*ALTER ROLE … SET extra_"):
            schema.require_session(database)
    database.close()


def test_a_pooler_that_keeps_the_options_to_itself_is_no_trouble_on_a_plain_server(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose own settings do no harm: jit is on, and the time zone may have any name."""
    name = database_url.rpartition("/")[2]
    execute(
        database_url,
        f"ALTER DATABASE {name} SET timezone = 'Etc/UTC'",
        f"ALTER DATABASE {name} SET datestyle = 'ISO, DMY'",
    )
    monkeypatch.setattr(engines, "_options", lambda settings: "")
    database = Database(database_url, prepare=False)
    found = database.read(
        lambda c: c.exec_driver_sql(
            "SELECT current_setting('jit'), current_setting('timezone')"
        ).one()
    )
    assert tuple(found) == ("on", "Etc/UTC")
    migrating.migrate(database)
    schema.require(database)
    house = House(database)
    assert house.get(house.submit()).create_time.tzinfo is UTC
    database.close()


# What is wrong is told.


def cause(database: Database) -> str:
    with pytest.raises(DatabaseUnavailable) as caught:
        database.read(lambda c: c.exec_driver_sql("SELECT 1"))
    database.close()
    assert str(caught.value) == "the database is out of reach; try again"  # to callers
    return caught.value.cause


def other(url: str, **parts: object) -> Database:
    changed = sa.make_url(url).set(**parts)  # type: ignore[arg-type]
    return Database(changed.render_as_string(hide_password=False))


def test_the_cause_is_in_the_servers_own_words(database_url: str) -> None:
    assert 'database "nowhere" does not exist' in cause(other(database_url, database="nowhere"))
    assert 'role "nobody" does not exist' in cause(other(database_url, username="nobody"))
    port = free_port()
    refused = cause(other(database_url, port=port))
    assert refused == f'connection to server at "127.0.0.1", port {port} failed: Connection refused'
    two = f"?host=127.0.0.1:{port}&host=127.0.0.2:{port}"
    for address in ("Connection refused", f'"127.0.0.2", port {port} failed: Connection refused'):
        assert address in cause(Database(f"postgresql+psycopg2://postgres@/postgres{two}"))
    assert "could not translate host name" in cause(other(database_url, host="nowhere.invalid"))
    no_tls = Database(database_url + "?sslmode=require")
    assert "server does not support SSL" in cause(no_tls)


def test_a_privilege_that_is_missing_is_told_in_one_line(database_url: str) -> None:
    migrated = open_database(database_url)
    execute(
        database_url,
        "DROP ROLE IF EXISTS jobsvc_stranger",
        "CREATE ROLE jobsvc_stranger LOGIN",
    )
    stranger = other(database_url, username="jobsvc_stranger")
    with pytest.raises(DatabaseUnavailable) as caught:
        schema.require(stranger)
    assert caught.value.cause == "permission denied for table alembic_version"
    with pytest.raises(DatabaseUnavailable) as caught:
        stranger.once(hot.claiming.CLAIM, "[]", [], "w", "0" * 32, "1 s")
    assert "permission denied for table" in caught.value.cause
    stranger.close()
    migrated.close()
    execute(database_url, "DROP ROLE jobsvc_stranger")


def test_a_migration_without_the_privilege_is_told_in_one_line(database_url: str) -> None:
    execute(
        database_url,
        "DROP ROLE IF EXISTS jobsvc_newcomer",
        "CREATE ROLE jobsvc_newcomer LOGIN",
    )
    newcomer = other(database_url, username="jobsvc_newcomer")
    with pytest.raises(DatabaseUnavailable) as caught:
        migrating.migrate(newcomer)
    assert caught.value.cause == "permission denied for schema public"
    newcomer.close()
    execute(database_url, "DROP ROLE jobsvc_newcomer")


def test_a_trouble_is_logged_once_for_as_long_as_it_lasts(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = other(database_url, database="nowhere")
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            with pytest.raises(DatabaseUnavailable):
                away.write(lambda tx: tx.now)
        monkeypatch.setattr(trouble, "FORGET_SECONDS", 0.0)
        with pytest.raises(DatabaseUnavailable):
            away.read(lambda c: c.exec_driver_sql("SELECT 1"))
    away.close()
    assert [log["event"] for log in logs] == ["database out of reach"] * 2
    assert all('"nowhere" does not exist' in log["reason"] for log in logs)


def test_the_driver_may_be_left_out_of_the_url(database_url: str) -> None:
    database = Database(database_url.replace("+psycopg2", ""))
    assert database.read(lambda c: c.exec_driver_sql("SELECT 1").scalar_one()) == 1
    database.close()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg2://jobsvc:s3cr3t:x@host:s3cr3t/jobsvc",
        "postgresql+psycopg2://jobsvc:p@s3cr3t@host/jobsvc",
        "postgresql+psycopg2:s3cr3t",
        "postgresql+psycopg2://jobsvc:s3cr3t@host/jobsvc?nonsense=s3cr3t",
    ],
)
def test_a_url_that_cannot_be_one_stops_the_start_and_is_not_told(url: str) -> None:
    with pytest.raises(CannotStart, match="JOBSVC_DATABASE_URL") as caught:
        Database(url)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("command", ["server", "worker", "migrate"])
def test_a_start_without_the_database_tells_why_in_one_line(command: str) -> None:
    port = free_port()
    environment = {
        "JOBSVC_DATABASE_URL": f"postgresql://jobsvc:s3cr3t@127.0.0.1:{port}/jobsvc",
        "JOBSVC_BROKER_URL": "amqp://127.0.0.1/",
        "JOBSVC_METRICS_LISTEN": "",
    }
    jobsvc = Path(sys.executable).with_name("jobsvc")
    done = subprocess.run([jobsvc, command], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    refused = f'connection to server at "127.0.0.1", port {port} failed: Connection refused'
    told = f"the database is out of reach: {refused}"
    logged, last = done.stderr.splitlines()
    assert "database out of reach" in logged
    assert last == told
    assert "s3cr3t" not in done.stderr
