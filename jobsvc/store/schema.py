"""The schema's version: bringing it to this release's, and refusing to run on another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from jobsvc import __version__
from jobsvc.errors import SchemaMismatch
from jobsvc.store.database import Database
from jobsvc.store.tables import service


def config(database: Database) -> Config:
    """Alembic's configuration for this database; migrations/env.py takes the engine from it."""
    alembic = Config()
    alembic.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    alembic.attributes["engine"] = database.engine
    return alembic


def migrate(database: Database) -> None:
    """Brings the schema to this release's; a newer one that serves this release is left as it is.
    Safe to run side by side with itself. Raises SchemaMismatch as `missing` does."""
    if missing(database):
        command.upgrade(config(database), "head")


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


def require(database: Database) -> None:
    """Raises SchemaMismatch unless this release can run on the schema."""
    if lacking := missing(database):
        raise SchemaMismatch(
            f"the database's schema is older than this release ({len(lacking)} migrations are "
            "missing); run: jobsvc migrate"
        )


@dataclass(frozen=True, slots=True)
class Identity:
    """Which database this is: a restored one begins another incarnation. `secret` signs tokens."""

    incarnation: str
    secret: bytes


def identity(connection: sa.Connection) -> Identity:
    row = connection.execute(sa.select(service.c.incarnation, service.c.secret)).one()
    return Identity(row.incarnation, row.secret)


def ping(connection: sa.Connection) -> None:
    """Asks the database anything at all."""
    connection.execute(sa.select(service.c.id))


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
