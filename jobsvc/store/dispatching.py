"""The outbox table: what is owed to the broker, and what the broker must have lost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from jobsvc.core.model import Dispatch, Effects
from jobsvc.core.states import JobState
from jobsvc.store import registry
from jobsvc.store.batch import Batch, dispatch_from_row
from jobsvc.store.database import Transaction
from jobsvc.store.dialects.clock import clock
from jobsvc.store.locking import lock, passing_over
from jobsvc.store.tables import jobs, outbox, queues

# How long a relay that took a row has to publish it before another may try.
TAKEN_SECONDS = 15.0
REDISPATCH_AGE_SECONDS = 60.0
# The message of a job that somebody else has locked goes round again after this long.
LOCKED_DELAY = timedelta(seconds=1)
HEAD_JOBS = 1000
_QUEUED = sa.and_(jobs.c.state == JobState.QUEUED.value, sa.not_(jobs.c.held))


def forget_published(tx: Transaction, outbox_ids: Sequence[int]) -> None:
    """These messages are on the broker."""
    tx.execute(sa.delete(outbox).where(outbox.c.id.in_(outbox_ids)))


def take_owed(tx: Transaction, limit: int) -> list[Dispatch]:
    """Rows that nobody published in time, passing over those that another relay has locked."""
    due = (
        sa.select(outbox.c.id)
        .where(outbox.c.not_before <= tx.now)
        .order_by(outbox.c.not_before)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    rows = tx.execute(
        sa.update(outbox)
        .where(outbox.c.id.in_(sa.select(due.c.id)))
        .values(not_before=tx.now + timedelta(seconds=TAKEN_SECONDS))
        .returning(outbox)
    )
    return [dispatch_from_row(row) for row in rows]


def republish(tx: Transaction, job_ids: Sequence[str]) -> Effects:
    """New messages for those of `job_ids` that are QUEUED: theirs went to a worker that cannot
    start them soon."""
    batch = Batch(tx)
    locked = lock(passing_over(tx), job_ids)
    keep_messages(batch, [job_id for job_id in job_ids if job_id not in locked])
    for job in locked.values():
        if job.state == JobState.QUEUED and not job.held:
            batch.dispatch(job)
    return batch.write()


def keep_messages(
    batch: Batch, job_ids: Collection[str], priorities: Mapping[str, int] | None = None
) -> None:
    """Of jobs that could not be locked, or are gone: each that is QUEUED gets another message soon,
    for it may be that when it is free again. `priorities`: as in `verbs.claim`."""
    if not job_ids or batch.tx.connection.dialect.name == "sqlite":  # which locks no rows
        return
    found = batch.tx.execute(
        sa.select(jobs.c.id, jobs.c.job_type, jobs.c.queue, jobs.c.priority, jobs.c.attempt).where(
            jobs.c.id.in_(sorted(job_ids)), _QUEUED
        )
    )
    for job in found:
        if priorities is None or priorities[job.id] == job.priority:
            batch.send_again(job, LOCKED_DELAY)


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits, in seconds (0 where nothing does). `oldest`: by queue, the longest-waiting job;
    `owed`: the oldest message owed to the broker. `workers`: by queue, how many live ones consume
    it."""

    oldest: dict[str, float]
    owed: float
    workers: dict[str, int]


def backlog(connection: sa.Connection) -> Backlog:
    """A queue's oldest job is looked for among those whose message is oldest; others have gone
    through the hands of a worker, which passes on what it cannot start within a moment."""
    now = clock(connection)
    found = connection.execute(sa.select(queues.c.name, oldest_queued(_QUEUED))).all()
    owed = connection.execute(sa.select(outbox.c.create_time).order_by(outbox.c.id).limit(1))
    live = registry.live_workers(connection, now)
    return Backlog(
        {name: _age(now, since) for name, since in found},
        _age(now, owed.scalar()),
        {name: live[name] for name, _ in found},
    )


def oldest_queued(queued: sa.ColumnElement[bool]) -> sa.ScalarSelect[datetime]:
    """Beside a row of `queues`: since when the longest-waiting of its `queued` jobs waits, among
    those that `backlog` looks at."""
    head = (
        sa.select(jobs.c.queued_time)
        .where(queued, jobs.c.queue == queues.c.name)
        .order_by(jobs.c.dispatch_time)
        .limit(HEAD_JOBS)
        .correlate(queues)
        .subquery()
    )
    return sa.select(sa.func.min(head.c.queued_time)).scalar_subquery()


def _age(now: datetime, since: datetime | None) -> float:
    return max((now - since).total_seconds(), 0.0) if since is not None else 0.0


def overdue_queues(connection: sa.Connection) -> list[str]:
    """Queues with a job that was dispatched long ago and has not started."""
    latest = clock(connection) - timedelta(seconds=REDISPATCH_AGE_SECONDS)
    waiting = sa.exists().where(
        _QUEUED, jobs.c.queue == queues.c.name, jobs.c.dispatch_time <= latest
    )
    return list(connection.execute(sa.select(queues.c.name).where(waiting)).scalars())


def short(tx: Transaction, queue: str, ready: int) -> bool:
    """Whether more jobs of `queue` wait to be claimed than messages can exist: `ready` on the
    broker, and what the live workers may hold."""
    possible = ready + registry.live_prefetch(tx, queue)
    waiting = sa.select(jobs.c.id).where(_QUEUED, jobs.c.queue == queue).limit(possible + 1)
    count = tx.execute(sa.select(sa.func.count()).select_from(waiting.subquery())).scalar_one()
    return int(count) > possible
