"""Reading the one order of all events: (x, job_id, sequence).

Why a reader that goes by it misses nothing, though transactions end in another order than they
begin: an event's x is at least its transaction's (`Transaction.x`), and so at least `x_base` plus
the number of that transaction. In one snapshot each transaction below the oldest number that is
still under way (its xmin) has ended: what it wrote is seen, or never will be. So below `x_base` +
xmin all is there and stays as it is, and whatever commits later lies at or above it; only up to
there is read. A job's events are in the order of their sequence, because each takes the greater of
its transaction's x and the x of the event before it (`jobs.last_x`), which its writer has read
under the row's lock. On SQLite there is one writer and x counts what it commits.

Nobody's position goes beyond what the latest event that is there makes certain, though xmin does:
after a crash PostgreSQL gives the numbers of transactions anew of which nothing was on its disk.
What is seen was on disk before, and so are all numbers up to its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from jobsvc.core.model import JobEvent
from jobsvc.store.rows import EVENT_COLUMNS, event_from_row
from jobsvc.store.schema import home, is_home
from jobsvc.store.tables import JobId, UtcTime, job_events, jobs, service

# After an event, or (x, NO_JOB, 0): before all that have this x.
Position = tuple[int, str, int]
NO_JOB = "00000000-0000-0000-0000-000000000000"

_FACTS = (
    *(jobs.c.job_type, jobs.c.queue, jobs.c.labels, jobs.c.idempotency_key),
    *(jobs.c.create_time, jobs.c.finish_time),
)
# Of the transactions that are still under way.
_OLDEST_NUMBER = sa.literal_column(
    "pg_snapshot_xmin(pg_current_snapshot())::text::bigint", sa.BigInteger
)


@dataclass(frozen=True, slots=True)
class FleetEvent:
    """An event, and what its job is known by as of the same read."""

    position: Position
    event: JobEvent
    job_type: str
    queue: str
    labels: dict[str, str]
    idempotency_key: str | None
    create_time: datetime
    finish_time: datetime | None


@dataclass(frozen=True, slots=True)
class Page:
    """`bound`: no event of a lower x is missing, or will be; what has committed at or above it
    cannot be told yet. `latest`: the greatest x of all that has committed. `at_home`: False where
    the database was restored since the incarnation began, and schema.settle is due. `now`: the
    database's clock."""

    incarnation: str
    at_home: bool
    now: datetime
    bound: int
    latest: int
    events: list[FleetEvent]

    @property
    def hidden(self) -> bool:
        """Whether something has committed that cannot be told yet."""
        return self.latest >= self.bound

    @property
    def end(self) -> Position:
        """Where whoever has had all that can be told stands."""
        return min(self.bound, self.latest + 1), NO_JOB, 0


def page_after(connection: sa.Connection, position: Position | None, limit: int) -> Page:
    """The up to `limit` events that follow the position, in order; for None no events, but all
    else. In one snapshot, whatever commits meanwhile."""
    x, job_id, sequence = position or (0, NO_JOB, 0)
    statement = _statement(connection.dialect.name == "sqlite")
    given = {"x": x, "job": job_id, "seq": sequence, "count": limit if position else 0}
    rows = connection.execute(statement, given).all()
    head = rows[0]
    return Page(
        incarnation=head.incarnation,
        at_home=is_home(head.home, home(connection)),
        now=head.now,
        bound=head.bound,
        latest=head.latest,
        events=[_event(row) for row in rows if row.job_id is not None],
    )


def _event(row: sa.Row[Any]) -> FleetEvent:
    return FleetEvent(
        position=(row.x, row.job_id, row.sequence),
        event=event_from_row(row),
        job_type=row.job_type,
        queue=row.queue,
        labels=row.labels,
        idempotency_key=row.idempotency_key,
        create_time=row.create_time,
        finish_time=row.finish_time,
    )


@functools.cache
def _statement(sqlite: bool) -> sa.Select[Any]:
    """What is known of the whole, beside each of the events; one row without any if there is none.

    Events are picked before jobs are looked up, for the planner not to begin with the jobs.
    """
    clock = sa.func.jobsvc_now if sqlite else sa.func.statement_timestamp
    bound = service.c.x_base + (1 if sqlite else _OLDEST_NUMBER)
    x = sa.bindparam("x", type_=sa.BigInteger)
    place = sa.tuple_(sa.bindparam("job", type_=JobId), sa.bindparam("seq", type_=sa.BigInteger))
    # Asked in this way it is the index's last entry, whatever the planner believes.
    latest = sa.select(sa.func.max(job_events.c.x)).scalar_subquery()
    order = job_events.c.x, job_events.c.job_id, job_events.c.sequence
    picked = (
        sa.select(*EVENT_COLUMNS)
        .where(
            job_events.c.x >= x,
            job_events.c.x < sa.select(bound).scalar_subquery(),
            sa.or_(
                job_events.c.x > x,
                sa.tuple_(job_events.c.job_id, job_events.c.sequence) > place,
            ),
        )
        .order_by(*order)
        .limit(sa.bindparam("count", type_=sa.Integer))
        .subquery("picked")
    )
    found = (
        sa.select(*picked.c, *_FACTS)
        .select_from(picked.join(jobs, jobs.c.id == picked.c.job_id))
        .subquery("found")
    )
    return (
        sa.select(
            service.c.incarnation,
            service.c.home,
            clock(type_=UtcTime).label("now"),
            bound.label("bound"),
            sa.func.coalesce(latest, 0).label("latest"),
            *found.c,
        )
        .select_from(service.outerjoin(found, sa.true()))
        .order_by(found.c.x, found.c.job_id, found.c.sequence)
    )
