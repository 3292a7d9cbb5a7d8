"""A database for a test alone: SQLite in a file, made once and copied."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from jobsvc.store import migrating
from jobsvc.store.database import Database
from tests.store.house import House

POOL_SIZE = 16


def hasten(database: Database) -> None:
    """No power cut is tested here, so nothing need wait for the disk."""

    def in_haste(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    sa.event.listen(database.engine, "connect", in_haste)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "jobsvc.db"
    database = Database(f"sqlite:///{path}")
    migrating.migrate(database)
    database.close()
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    shutil.copy(sqlite_template, tmp_path / "jobsvc.db")
    return f"sqlite:///{tmp_path / 'jobsvc.db'}"


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    made = Database(sqlite_url, pool_size=POOL_SIZE)
    hasten(made)
    yield made
    made.close()


@pytest.fixture
def house(database: Database) -> House:
    return House(database)
