from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command as alembic_command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from jobsvc.errors import SchemaMismatch
from jobsvc.store import migrating, schema
from jobsvc.store.database import Database
from jobsvc.store.dialects import engines
from jobsvc.store.tables import metadata, service
from tests.services import fresh_database
from tests.store.conftest import POSTGRESQL, connect, sqlite_url
from tests.store.house import WAIT_SECONDS_MAX, House, wait_until_blocked


@pytest.fixture(params=["sqlite", *POSTGRESQL])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of this test's own without a schema."""
    if request.param == "sqlite":
        yield sqlite_url(tmp_path)
        return
    with fresh_database(request.getfixturevalue(POSTGRESQL[request.param])) as url:
        yield url


@pytest.fixture
def empty(empty_url: str) -> Iterator[Database]:
    database = connect(empty_url)
    yield database
    database.close()


def tables(database: Database) -> set[str]:
    return set(sa.inspect(database.engine).get_table_names()) - {"alembic_version"}


def incarnation(database: Database) -> str:
    return str(database.read(lambda c: c.execute(sa.select(service.c.incarnation)).scalar_one()))


@pytest.mark.filterwarnings("ignore:.*expression-based index")
def test_the_migrations_make_what_tables_py_says(migrated: Database) -> None:
    with migrated.engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "compare_server_default": _compare_default if migrated.sqlite else True,
                "include_object": _as_reflected if migrated.sqlite else None,
            },
        )
        assert compare_metadata(context, metadata) == []
        found = sa.inspect(connection)
        for table in metadata.sorted_tables:
            # What alembic does not compare: checks by name, and the conditions of indexes.
            checks = {str(c["name"]) for c in found.get_check_constraints(table.name)}
            expected = {str(c.name) for c in table.constraints if isinstance(c, sa.CheckConstraint)}
            assert checks == expected
            where = f"{connection.dialect.name}_where"
            conditions = {
                str(index["name"]): _words(index.get("dialect_options", {}).get(where))
                for index in found.get_indexes(table.name)
            }
            assert conditions == {
                str(index.name): _words(index.dialect_options[connection.dialect.name]["where"])
                for index in table.indexes
                if not (migrated.sqlite and index.name == "ix_jobs_list_error")
            }


def _compare_default(
    _context: MigrationContext, _inspected: object, column: sa.Column[object], *_: object
) -> bool | None:
    """None leaves it to alembic, which misses the Identity of what is one on SQLite anyway."""
    return False if column.identity else None


def _as_reflected(_object: object, name: str | None, *_: object) -> bool:
    """On SQLite nothing reflects the direction of an index's column, or an expression."""
    return name not in ("ix_jobs_held", "ix_jobs_held_key", "ix_jobs_list_error")


def _words(condition: object) -> list[str]:
    """The names and values of a condition: PostgreSQL writes IN as = ANY (ARRAY[...])."""
    noise = {"AND", "IN", "ANY", "ARRAY", "text"}
    words = re.findall(r"\w+", "" if condition is None else str(condition))
    return [word for word in words if word not in noise]


def test_migrating_again_changes_nothing(empty: Database) -> None:
    migrating.migrate(empty)
    assert tables(empty) == set(metadata.tables)
    before = incarnation(empty)
    migrating.migrate(empty)
    assert incarnation(empty) == before
    assert migrating.missing(empty) == []


def test_each_database_has_an_incarnation_of_its_own(migrated: Database, empty: Database) -> None:
    migrating.migrate(empty)
    assert incarnation(migrated) != incarnation(empty)


MIGRATE = """
import sys
from jobsvc.store import migrating, schema
from jobsvc.store.database import Database
database = Database(sys.argv[1])
migrating.config(database)
print("ready", flush=True)
sys.stdin.readline()
migrating.migrate(database)
"""


def test_two_may_migrate_at_once(empty_url: str, empty: Database) -> None:
    """Two processes, as alembic keeps what it does in one place of a process."""
    command = [sys.executable, "-c", MIGRATE, empty_url]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=WAIT_SECONDS_MAX)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert tables(empty) == set(metadata.tables)
    assert migrating.missing(empty) == []


def test_a_migration_waits_for_another_however_long_that_takes(postgresql_url: str) -> None:
    """Longer than a table's lock is waited for."""
    with fresh_database(postgresql_url) as url:
        slow, waiting = connect(url), connect(url)
        with slow.engine.connect() as connection:
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(1785684595)")
            migration = threading.Thread(target=lambda: migrating.migrate(waiting))
            migration.start()
            wait_until_blocked(House(slow))
            migration.join(2.2)
            assert migration.is_alive()
        migration.join(WAIT_SECONDS_MAX)
        assert migrating.missing(slow) == []
        slow.close()
        waiting.close()


def test_migrating_leaves_the_connections_as_they_were(migrated_postgresql: Database) -> None:
    """They go back to the pool, and serve calls next."""
    migrating.migrate(migrated_postgresql)
    with migrated_postgresql.engine.connect() as connection:
        for setting, expected in (("statement_timeout", "5s"), ("lock_timeout", "1s")):
            assert connection.exec_driver_sql(f"SHOW {setting}").scalar_one() == expected


def test_down_and_up_again(empty: Database) -> None:
    migrating.migrate(empty)
    alembic_command.downgrade(migrating.config(empty), "base")
    assert tables(empty) == set()
    assert migrating.missing(empty) != []
    migrating.migrate(empty)
    assert tables(empty) == set(metadata.tables)
    house = House(empty)
    assert house.get(house.submit()).last_sequence == 1


def test_an_older_schema_is_refused(empty: Database) -> None:
    scripts = list(ScriptDirectory.from_config(migrating.config(empty)).walk_revisions())
    expected = [f"{script.revision}: {script.doc}" for script in reversed(scripts)]
    assert migrating.missing(empty) == expected
    with pytest.raises(SchemaMismatch, match=f"{len(expected)} migrations .* jobsvc migrate"):
        schema.require(empty)
    migrating.migrate(empty)
    assert scripts[0].revision == schema.REVISION
    schema.require(empty)


@pytest.mark.parametrize(
    ("oldest", "served"), [("0.9.0", True), ("0.8.10", True), ("0.10.0", False), ("2", False)]
)
def test_a_newer_schema_says_whom_it_still_serves(
    empty: Database, monkeypatch: pytest.MonkeyPatch, oldest: str, served: bool
) -> None:
    monkeypatch.setattr(migrating, "__version__", "0.9.0")
    migrating.migrate(empty)

    def become_newer(connection: sa.Connection) -> None:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'from_the_future'"))
        connection.execute(sa.update(service).values(oldest_release=oldest))

    empty.write(lambda tx: become_newer(tx.connection))
    for check in (schema.require, migrating.migrate):
        if served:
            check(empty)
        else:
            with pytest.raises(SchemaMismatch, match=f"serves releases from {re.escape(oldest)}"):
                check(empty)


@pytest.mark.parametrize("name", ["a?mode=ro", "100%20x", "100%", "a#b", "a b", "ü", "x:y@z"])
def test_a_directory_may_have_any_name(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / name
    directory.mkdir()
    here = Path(migrating.__file__).parent
    (directory / "migrations").symlink_to(here / "migrations")
    monkeypatch.setattr(migrating, "__file__", str(directory / "migrating.py"))
    database = Database(engines.sqlite_url(directory / "jobsvc.db"))
    migrating.migrate(database)
    assert not migrating.missing(database)
    database.close()
    assert {path.name for path in tmp_path.iterdir()} == {name}
    assert (directory / "jobsvc.db").stat().st_size


def test_who_finds_the_schema_as_it_should_be_loads_no_alembic(
    migrated_postgresql: Database,
) -> None:
    migrating.migrate(migrated_postgresql)
    url = migrated_postgresql.url.render_as_string(hide_password=False)
    program = (
        "import sys; from jobsvc.store import schema; from jobsvc.store.database import Database; "
        f"schema.require(Database({url!r})); print('alembic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
