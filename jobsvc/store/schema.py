"""Refusing to run on another schema than this release's. And which database this is: whether it was
restored, and so is not the one that tokens were made for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from jobsvc.errors import DatabaseUnfit, SchemaMismatch
from jobsvc.store.database import Database
from jobsvc.store.dialects.engines import HARMLESS, SESSION
from jobsvc.store.tables import job_events, service

REVISION = "0003"  # of the last migration
# What tells one database from another, however alike they are within. A role of a managed service
# may not be allowed to ask for all of it, or find it unsupported.
_HOME = (
    "SELECT system_identifier FROM pg_control_system()",
    # The timeline: another one after a recovery to an earlier time, and after a failover.
    "SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)",
    "SELECT oid FROM pg_database WHERE datname = current_database()",
)
_UNTOLD = {"42501", "0A000", "55000"}
_NEXT_NUMBER = sa.literal_column(
    "pg_snapshot_xmax(pg_current_snapshot())::text::bigint", sa.BigInteger
)
_LATEST = sa.select(sa.func.max(job_events.c.x)).scalar_subquery()
# For whoever is writing to come to an end, which takes no longer than a statement may.
_SETTLE_SECONDS_MAX = 8


def require_session(database: Database) -> None:
    """Raises DatabaseUnfit where sessions are not what all else relies on: a database cannot hold
    every text, or a pooler in between keeps from the server what a session asks for."""
    if database.sqlite:
        return
    wanted = {"server_encoding": "UTF8", "client_encoding": "UTF8"}
    wanted |= {name: value for name, value in SESSION.items() if name not in HARMLESS}
    found = database.read(lambda connection: _settings(connection, wanted))
    if found["server_encoding"] != "UTF8":
        raise DatabaseUnfit(
            f"the database {database.url.database} has the encoding {found['server_encoding']}, "
            "which cannot hold every text; make one with: CREATE DATABASE … ENCODING 'UTF8' "
            "TEMPLATE template0"
        )
    others = {name: value for name, value in found.items() if value.lower() != wanted[name].lower()}
    if others:
        listed = ", ".join(f"{name} = {value}" for name, value in sorted(others.items()))
        told = "; ".join(f"ALTER ROLE … SET {name} = '{wanted[name]}'" for name in sorted(others))
        raise DatabaseUnfit(
            f"sessions are not as the service asks for them ({listed}): a pooler in between must "
            f"pass `options` on, or: {told}"
        )


def _settings(connection: sa.Connection, names: Iterable[str]) -> dict[str, str]:
    values = {name: sa.func.current_setting(name, type_=sa.Text).label(name) for name in names}
    return dict(connection.execute(sa.select(*values.values())).mappings().one())


def require(database: Database) -> None:
    """Raises SchemaMismatch unless this release can run on the schema, and DatabaseUnfit as
    `require_session`. Then as `settle`."""
    require_session(database)
    if not database.read(_is_current):
        _require_served(database)
    settle(database)


def _is_current(connection: sa.Connection) -> bool:
    version = sa.table("alembic_version", sa.column("version_num"))
    return (
        sa.inspect(connection).has_table(version.name)
        and connection.scalar(sa.select(version.c.version_num)) == REVISION
    )


def _require_served(database: Database) -> None:
    # Alembic takes 12 MiB, which no process needs that finds the schema as it should be.
    from jobsvc.store import migrating

    if lacking := migrating.missing(database):
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


def service_id(connection: sa.Connection) -> str:
    """What tells this service from others, restored or not; it tells nothing of the secret."""
    return hashlib.sha256(b"service:" + identity(connection).secret).hexdigest()[:16]


def settle(database: Database) -> None:
    """Begins another incarnation where the database has been restored since the present one began:
    from a dump, to an earlier time, or by a failover, which may have lost what was committed last.

    Its numbers of transactions may have begun anew then, so that events would be numbered below
    those that are there: `x_base` is raised above them. Safe to run side by side with itself and
    with all else. On SQLite, which counts in its own file, there is nothing to do. Raises
    DatabaseUnavailable.
    """
    if database.sqlite:
        return
    here = database.read(home)
    if database.read(lambda connection: _settled(connection, here)):
        return
    try:
        with database.engine.begin() as connection:
            wait = f"SET LOCAL lock_timeout = '{_SETTLE_SECONDS_MAX}s'"
            connection.exec_driver_sql(f"{wait}; SET LOCAL statement_timeout = 0")
            # Each transaction that writes reads this table first: those that know the old x_base
            # have ended then, and none begins.
            connection.exec_driver_sql("LOCK TABLE service IN ACCESS EXCLUSIVE MODE")
            if not _settled(connection, here):
                _begin_incarnation(connection, here)
    except DBAPIError as error:
        raise database.translated(error) from error


def home(connection: sa.Connection) -> str:
    """Which cluster, timeline and database the connection leads to, as far as its role can know;
    '' on SQLite. Fit for connections that commit by themselves only: what is not allowed fails."""
    if connection.dialect.name == "sqlite":
        return ""
    # It stays the same as long as the connection does.
    if "home" not in connection.info:
        connection.info["home"] = "/".join(_told(connection, question) for question in _HOME)
    return str(connection.info["home"])


def is_home(stored: str, here: str) -> bool:
    """Whether the home that the service has stored can be `here`; two roles may know different
    parts of it."""
    pairs = zip(stored.split("/"), here.split("/"), strict=False)
    return all(was == now or not was or not now for was, now in pairs)


def _told(connection: sa.Connection, question: str) -> str:
    try:
        return str(connection.exec_driver_sql(question).scalar_one())
    except DBAPIError as error:
        if getattr(error.orig, "pgcode", None) in _UNTOLD:
            return ""
        raise


def _standing(connection: sa.Connection) -> tuple[str, bool]:
    """The home that is stored, '' at first; and whether there are events of transactions that this
    cluster has not come to yet."""
    ahead = service.c.x_base + _NEXT_NUMBER <= _LATEST
    stored, numbers_began_anew = connection.execute(sa.select(service.c.home, ahead)).one()
    return stored, bool(numbers_began_anew)


def _settled(connection: sa.Connection, here: str) -> bool:
    stored, numbers_began_anew = _standing(connection)
    return bool(stored) and is_home(stored, here) and not numbers_began_anew


def _begin_incarnation(connection: sa.Connection, here: str) -> None:
    stored, numbers_began_anew = _standing(connection)
    values: dict[str, Any] = {"home": here}
    if stored or numbers_began_anew:
        values["incarnation"] = str(uuid4())
    if numbers_began_anew:
        values["x_base"] = _LATEST
    connection.execute(sa.update(service).values(values))


def ping(connection: sa.Connection) -> None:
    """Asks the database anything at all."""
    connection.execute(sa.select(service.c.id))
