"""Every test that takes `database` or `house` runs once on each database that is supported."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import sqlalchemy as sa

from jobsvc.store import migrating
from jobsvc.store.database import Database
from tests.checker import check
from tests.services import fresh_database
from tests.store.clock import make_clock
from tests.store.house import House, wipe

# Where verbs do all, and where the hot path takes what is plain.
POSTGRESQL = {
    "postgresql15-verbs": "postgres_url",
    "postgresql15": "postgres_url",
    "postgresql18": "postgres18_url",
}
POOL_SIZE = 20


def connect(url: str) -> Database:
    """A power cut is not tested here, so SQLite need not wait for the disk."""
    database = Database(url, pool_size=POOL_SIZE)
    if database.sqlite:

        def in_haste(connection: sqlite3.Connection, _record: object) -> None:
            connection.execute("PRAGMA synchronous=OFF")

        sa.event.listen(database.engine, "connect", in_haste)
    return database


def open_database(url: str) -> Database:
    """New, with the schema in place."""
    database = connect(url)
    if database.sqlite:
        assert database.url.database
        Path(database.url.database).write_bytes(_empty_file())
    else:
        migrating.migrate(database)
    return database


@cache
def _empty_file() -> bytes:
    """An SQLite database as migrations make it, to copy: quicker than to run them each time."""
    with TemporaryDirectory() as directory:
        database = connect(sqlite_url(Path(directory)))
        migrating.migrate(database)
        database.close()
        return (Path(directory) / "jobs.db").read_bytes()


@pytest.fixture(scope="session", params=["sqlite", *POSTGRESQL])
def store_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A database for the whole run; each test finds its tables empty."""
    if request.param == "sqlite":
        yield sqlite_url(tmp_path_factory.mktemp("store"))
        return
    with fresh_database(request.getfixturevalue(POSTGRESQL[request.param])) as url:
        yield url


@pytest.fixture(scope="session", params=list(POSTGRESQL))
def postgresql_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same where a test is about PostgreSQL alone."""
    with fresh_database(request.getfixturevalue(POSTGRESQL[request.param])) as url:
        yield url


@pytest.fixture(scope="session")
def migrated(store_url: str) -> Iterator[Database]:
    database = open_database(store_url)
    if not database.sqlite:
        make_clock(database)
    yield database
    database.close()


@pytest.fixture(scope="session")
def migrated_postgresql(postgresql_url: str) -> Iterator[Database]:
    database = open_database(postgresql_url)
    make_clock(database)
    yield database
    database.close()


@pytest.fixture
def house(migrated: Database, request: pytest.FixtureRequest) -> Iterator[House]:
    """Empty at first; in the end every history in it must be legal."""
    wipe(migrated)
    yield House(migrated, hot=_is_hot(request, "store_url"))
    check(migrated)


@pytest.fixture
def pg_house(migrated_postgresql: Database, request: pytest.FixtureRequest) -> Iterator[House]:
    wipe(migrated_postgresql)
    yield House(migrated_postgresql, hot=_is_hot(request, "postgresql_url"))
    check(migrated_postgresql)


def _is_hot(request: pytest.FixtureRequest, fixture: str) -> bool:
    on: str = request.node.callspec.params[fixture]
    return on in POSTGRESQL and not on.endswith("-verbs")


@pytest.fixture
def sqlite_house(tmp_path: Path) -> Iterator[House]:
    """SQLite alone, and not checked in the end: for tests that break it."""
    database = open_database(sqlite_url(tmp_path))
    yield House(database)
    database.close()


def sqlite_url(directory: Path) -> str:
    return f"sqlite:///{directory / 'jobs.db'}"
