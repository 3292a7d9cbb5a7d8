"""The database's clock, and what a transaction learns together with it."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from jobsvc.store.tables import UtcTime, service

# The number of the transaction that asks (which gives it one), or NULL where there is none to ask.
NUMBER = sa.literal_column("pg_current_xact_id()::text::bigint", sa.BigInteger).label("number")
_FACTS = service.c.registry_revision, service.c.limited, service.c.x_base
CLOCK = sa.select(sa.func.clock_timestamp(type_=UtcTime).label("now"), *_FACTS)
CLOCK_NUMBERED = sa.select(*CLOCK.selected_columns, NUMBER)
CLOCK_SQLITE = sa.select(sa.func.jobsvc_now(type_=UtcTime).label("now"), *_FACTS)


def clock(connection: sa.Connection) -> datetime:
    """The database's clock, for reads."""
    statement = CLOCK_SQLITE if connection.dialect.name == "sqlite" else CLOCK
    now: datetime = connection.execute(statement).one().now
    return now
