"""The schema's version: what it is, and bringing it to this release's."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DBAPIError

from jobsvc import __version__
from jobsvc.errors import SchemaMismatch
from jobsvc.store.database import Database
from jobsvc.store.schema import require_session, settle
from jobsvc.store.tables import service


def config(database: Database) -> Config:
    """Alembic's configuration for this database; migrations/env.py takes the engine from it."""
    alembic = Config()
    scripts = str(Path(__file__).parent / "migrations")
    alembic.set_main_option("script_location", scripts.replace("%", "%%"))  # as in an .ini file
    alembic.attributes["engine"] = database.engine
    return alembic


def migrate(database: Database) -> None:
    """Brings the schema to this release's; a newer one that serves this release is left as it is.
    Then as `schema.settle`. Safe to run side by side with itself. Raises SchemaMismatch as
    `missing` does."""
    require_session(database)
    if missing(database):
        try:
            command.upgrade(config(database), "head")
        except DBAPIError as error:
            raise database.translated(error) from error
    settle(database)


def missing(database: Database) -> list[str]:
    """The migrations that the database lacks, oldest first, each as "revision: what it does".

    Raises SchemaMismatch where the schema is newer and does not serve this release any more.
    """
    scripts = ScriptDirectory.from_config(config(database))

    def current(connection: sa.Connection) -> str | None:
        return MigrationContext.configure(connection).get_current_revision()

    revision = database.read(current)
    known = {script.revision: script for script in scripts.walk_revisions()}
    if revision is not None and revision not in known:
        _refuse_unless_served(database)
        return []
    lacking = scripts.iterate_revisions("head", revision or "base")
    return [f"{s.revision}: {s.doc}" for s in reversed(list(lacking))]


def _refuse_unless_served(database: Database) -> None:
    oldest = str(
        database.read(lambda c: c.execute(sa.select(service.c.oldest_release)).scalar_one())
    )
    if _release(__version__) < _release(oldest):
        raise SchemaMismatch(
            f"the database's schema is newer and serves releases from {oldest} on; "
            f"this is {__version__}: install a newer one"
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())
