"""Reading the one order of all events: (x, job_id, sequence).

Why a reader that goes by it misses nothing, though transactions end in another order than they
begin: an event's x is at least its transaction's (`Transaction.x`), and so at least `x_base` plus
the number of that transaction. In one snapshot each transaction below the oldest number that is
still under way (its xmin) has ended: what it wrote is seen, or never will be. So below `x_base` +
xmin all is there and stays as it is, and whatever commits later lies at or above it; only up to
there is read. A job's events are in the order of their sequence, because each takes the greater of
its transaction's x and the x of the event before it (`jobs.last_x`), which its writer has read
under the row's lock. On SQLite there is one writer and x counts what it commits.

Anybody's transaction has such a number, in whichever database of the cluster it is, and one that
stays open would hide what commits after it. Where one does, the reader may ask who is at work
(`apart`), and passes over those that are known to be foreign: that can write no event, as they are
in another database or of a role that may not. Why that misses nothing either: whoever is passed
over was under way in the snapshot, and is seen after it, under the same number, where it belongs.
A number is given once, and its session stays in its database; so it began there. Who has ended
meanwhile, or cannot be told, counts as one of ours. The other way around it would be wrong: a
session that was seen first may have ended, and its place be taken by one of ours that writes. And
that is what PostgreSQL does with a statement: its snapshot is taken before it runs. (Sessions are
looked at once a transaction, so this statement is to be the only one of its own.) Where the bound
falls back for a look, since somebody has just ended, only less is read.

Nobody's position goes beyond what the latest event that is there makes certain, though xmin does:
after a crash PostgreSQL gives the numbers of transactions anew of which nothing was on its disk.
What is seen was on disk before, and so are all numbers up to its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from jobsvc.core.model import JobEvent
from jobsvc.store.dialects.reading import id_text, in_order, json_text, microseconds, moment
from jobsvc.store.rows import event, event_columns
from jobsvc.store.schema import home, is_home
from jobsvc.store.tables import JobId, UtcTime, job_events, jobs, service

# After an event, or (x, NO_JOB, 0): before all that have this x.
Position = tuple[int, str, int]
NO_JOB = "00000000-0000-0000-0000-000000000000"

# Of the transactions that are still under way.
_OLDEST_NUMBER = sa.literal_column(
    "pg_snapshot_xmin(pg_current_snapshot())::text::bigint", sa.BigInteger
)
_NEXT_NUMBER = sa.literal_column(
    "pg_snapshot_xmax(pg_current_snapshot())::text::bigint", sa.BigInteger
)
# Of those that are not known to be foreign. A session's role may be any that it is a member of.
_OLDEST_NUMBER_APART = sa.literal_column(
    """(
    SELECT coalesce(
        min(number::text::bigint), pg_snapshot_xmax(pg_current_snapshot())::text::bigint
    )
    FROM pg_snapshot_xip(pg_current_snapshot()) AS number
    WHERE NOT EXISTS (
        SELECT FROM pg_catalog.pg_stat_activity AS session
        WHERE session.backend_xid = number::xid AND (
            session.datid <> (SELECT oid FROM pg_database WHERE datname = current_database())
            OR session.usename IS NOT NULL AND NOT EXISTS (
                SELECT FROM pg_roles
                WHERE pg_has_role(session.usesysid, pg_roles.oid, 'MEMBER')
                    AND has_any_column_privilege(pg_roles.oid, 'job_events', 'INSERT')
            )
        )
    ) AND NOT EXISTS (
        SELECT FROM pg_catalog.pg_prepared_xacts AS prepared
        WHERE prepared.transaction = number::xid AND prepared.database <> current_database()
    )
)""",
    sa.BigInteger,
)
_MAY_ASK = """
    SELECT has_table_privilege('pg_catalog.pg_stat_activity', 'SELECT')
        AND has_table_privilege('pg_catalog.pg_prepared_xacts', 'SELECT')
"""


class FleetEvent(NamedTuple):
    """An event, and what its job is known by as of the same read. As the database gave it: most
    watchers look at little of it. Times are in microseconds since 1970."""

    x: int
    job_id: str
    sequence: int
    type: str
    state: str
    time: int
    attempt: int
    worker_id: str | None
    detail: str | None  # JSON
    job_type: str
    queue: str
    job_labels: str  # JSON
    idempotency_key: str | None
    created: int
    finished: int | None

    @property
    def position(self) -> Position:
        return self[:3]

    @property
    def event(self) -> JobEvent:
        return event(self[1:9])

    @property
    def create_time(self) -> datetime:
        return moment(self.created)

    @property
    def finish_time(self) -> datetime | None:
        return None if self.finished is None else moment(self.finished)

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = json.loads(self.job_labels)
        return labels


@dataclass(frozen=True, slots=True)
class Page:
    """`bound`: no event of a lower x is missing, or will be; what has committed at or above it
    cannot be told yet. `following`: what is yet to begin lies at or above it. `passed_over`: there
    are transactions below the bound that are known to be foreign. `latest`: the greatest x of all
    that has committed. `at_home`: False where the database was restored since the incarnation
    began, and schema.settle is due. `now`: the database's clock."""

    incarnation: str
    at_home: bool
    now: datetime
    bound: int
    following: int
    passed_over: bool
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


def page_after(
    connection: sa.Connection, position: Position | None, limit: int, *, apart: bool = False
) -> Page:
    """The up to `limit` events that follow the position, in order; for None no events, but all
    else. In one snapshot, whatever commits meanwhile. `apart`: asks who is at work, where the role
    may, and passes over who is foreign; on a connection that commits by itself."""
    x, job_id, sequence = position or (0, NO_JOB, 0)
    count = limit if position else 0
    read = _read_apart if apart and _may_ask(connection) else _read
    rows = read(connection, {"x": x, "job": job_id, "seq": sequence, "count": count})
    incarnation, at, now, bound, oldest, following, latest, first, *_ = rows[0]
    return Page(
        incarnation=incarnation,
        at_home=is_home(at, home(connection)),
        now=moment(now),
        bound=bound,
        following=following,
        passed_over=oldest < bound,
        latest=latest,
        events=[FleetEvent._make(row[_HEAD:]) for row in rows] if first is not None else [],
    )


def _may_ask(connection: sa.Connection) -> bool:
    if connection.dialect.name == "sqlite":
        return False
    if "may_ask" not in connection.info:
        connection.info["may_ask"] = connection.exec_driver_sql(_MAY_ASK).scalar_one()
    return bool(connection.info["may_ask"])


_HEAD = 7  # columns that are not the event's


@in_order
def _read(sqlite: bool) -> sa.Select[Any]:
    return _select(sqlite, _OLDEST_NUMBER)


@in_order
def _read_apart(sqlite: bool) -> sa.Select[Any]:
    return _select(sqlite, _OLDEST_NUMBER_APART)


def _select(sqlite: bool, first_number: sa.ColumnElement[int]) -> sa.Select[Any]:
    """What is known of the whole, beside each of the events; one row without any if there is none.

    Events are picked before jobs are looked up, for the planner not to begin with the jobs.
    """
    clock = sa.func.jobsvc_now if sqlite else sa.func.statement_timestamp
    bound = service.c.x_base + (1 if sqlite else first_number)
    oldest = service.c.x_base + (1 if sqlite else _OLDEST_NUMBER)
    following = service.c.x_base + (1 if sqlite else _NEXT_NUMBER)
    x = sa.bindparam("x", type_=sa.BigInteger)
    place = sa.tuple_(sa.bindparam("job", type_=JobId), sa.bindparam("seq", type_=sa.BigInteger))
    # Asked in this way it is the index's last entry, whatever the planner believes.
    latest = sa.select(sa.func.max(job_events.c.x)).scalar_subquery()
    order = job_events.c.x, job_events.c.job_id, job_events.c.sequence
    picked = (
        sa.select(job_events)
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
        sa.select(
            *(picked.c.x, picked.c.job_id.label("place")),
            *event_columns(sqlite, picked),
            *(jobs.c.job_type, jobs.c.queue, json_text(jobs.c.labels, sqlite).label("labels")),
            jobs.c.idempotency_key,
            microseconds(jobs.c.create_time, sqlite).label("created"),
            microseconds(jobs.c.finish_time, sqlite).label("finished"),
        )
        .select_from(picked.join(jobs, jobs.c.id == picked.c.job_id))
        .subquery("found")
    )
    return (
        sa.select(
            id_text(service.c.incarnation, sqlite).label("incarnation"),
            service.c.home,
            microseconds(clock(type_=UtcTime), sqlite).label("now"),
            bound.label("bound"),
            oldest.label("oldest"),
            following.label("following"),
            sa.func.coalesce(latest, 0).label("latest"),
            *(column for column in found.c if column.name != "place"),
        )
        .select_from(service.outerjoin(found, sa.true()))
        .order_by(found.c.x, found.c.place, found.c.sequence)
    )
