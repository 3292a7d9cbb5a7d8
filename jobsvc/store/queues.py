"""Queues as operators see and set them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from jobsvc.core.model import Effects
from jobsvc.core.operations import Queue, RateLimit
from jobsvc.core.states import JobState
from jobsvc.store import registry
from jobsvc.store.batch import Batch
from jobsvc.store.database import Transaction
from jobsvc.store.dialects.clock import clock
from jobsvc.store.dialects.statements import insert_many, insert_or_ignore
from jobsvc.store.dispatching import oldest_queued
from jobsvc.store.rules.limits import LIMITED, Room, count_running, counts_until
from jobsvc.store.rules.releasing import release
from jobsvc.store.tables import jobs, queue_starts, queues, service

# How many held jobs whoever changes a queue releases; the others follow at once.
RELEASED_MAX = 500


def set_paused(tx: Transaction, name: str, paused: bool) -> Effects:
    """Makes the queue known if it was not."""
    _lock(tx, name)
    return _change(tx, name, {"paused": paused})


def set_limits(
    tx: Transaction,
    name: str,
    mask: Collection[str],
    max_running: int | None,
    rate_limit: RateLimit | None,
) -> Effects:
    """Those that `mask` names; None is no limit. Makes the queue known if it was not."""
    before = _lock(tx, name)
    values: dict[str, Any] = {}
    if "max_running" in mask:
        values["max_running"] = max_running
    if "rate_limit" in mask:
        _move_starts(tx, name, before.rate_period, rate_limit.period if rate_limit else None)
        values["rate_max_starts"] = rate_limit.max_starts if rate_limit else None
        values["rate_period"] = rate_limit.period if rate_limit else None
    return _change(tx, name, values)


def _lock(tx: Transaction, name: str) -> sa.Row[Any]:
    """The row of the queue. Before it that of the service: whether any queue has a limit can be
    said by one transaction at a time only."""
    tx.execute(sa.select(service.c.id).with_for_update())
    add_queues(tx, [name])
    return tx.execute(sa.select(queues).where(queues.c.name == name).with_for_update()).one()


def _change(tx: Transaction, name: str, values: dict[str, Any]) -> Effects:
    tx.execute(sa.update(queues).where(queues.c.name == name).values(values))
    limited = bool(tx.execute(sa.select(sa.exists().where(LIMITED))).scalar_one())
    tx.execute(sa.update(service).where(service.c.limited != limited).values(limited=limited))
    tx.limited = limited
    batch = Batch(tx)
    release(batch, Room(tx, [name], ()), [name], {}, RELEASED_MAX)
    return batch.write()


def _move_starts(tx: Transaction, name: str, was: float | None, period: float | None) -> None:
    """What was started still counts, for as long as it does by the new period."""
    if was == period:
        return
    gone = sa.delete(queue_starts).where(queue_starts.c.queue == name)
    started: Counter[datetime] = Counter()
    for row in tx.execute(gone.returning(queue_starts.c.until, queue_starts.c.starts)).all():
        if was is not None and period is not None and row.until > tx.now:
            started[counts_until(row.until - timedelta(seconds=was), period)] += row.starts
    insert_many(
        tx.connection,
        queue_starts,
        [{"queue": name, "until": until, "starts": count} for until, count in started.items()],
    )


def list_queues(connection: sa.Connection, after: str, limit: int) -> list[Queue]:
    """The up to `limit` queues that follow `after`, by name."""
    return _load(connection, sa.select(queues).where(queues.c.name > after).limit(limit))


def get_queue(connection: sa.Connection, name: str) -> Queue:
    """One that is known."""
    (queue,) = _load(connection, sa.select(queues).where(queues.c.name == name))
    return queue


def _load(connection: sa.Connection, wanted: sa.Select[Any]) -> list[Queue]:
    oldest = oldest_queued(_in(JobState.QUEUED)).label("oldest")
    rows = connection.execute(wanted.add_columns(oldest).order_by(queues.c.name)).all()
    if not rows:
        return []
    now = clock(connection)
    counts = _counts(connection)
    live = registry.live_workers(connection, now)
    unacknowledged = registry.unacknowledged_messages(connection, now)
    return [
        Queue(
            name=row.name,
            generation=row.generation,
            paused=row.paused,
            max_running=row.max_running,
            rate_limit=(
                RateLimit(row.rate_max_starts, row.rate_period)
                if row.rate_max_starts is not None
                else None
            ),
            counts=counts[row.name],
            oldest_queued_age=(
                max((now - row.oldest).total_seconds(), 0.0) if row.oldest is not None else None
            ),
            live_workers=live[row.name],
            unacknowledged_messages=unacknowledged[row.name],
        )
        for row in rows
    ]


def _counts(connection: sa.Connection) -> defaultdict[str, dict[JobState, int]]:
    """Of jobs that have not ended, by queue. Each state from the index that is about it alone."""
    timed = (
        (JobState.SCHEDULED, jobs.c.schedule_time),
        (JobState.QUEUED, jobs.c.dispatch_time),
        (JobState.RETRYING, jobs.c.next_attempt_time),
    )
    counts: defaultdict[str, dict[JobState, int]] = defaultdict(dict)
    for queue, running in count_running(connection).items():
        counts[queue][JobState.RUNNING] = running
    for state, time in timed:
        statement = sa.select(jobs.c.queue, sa.func.count(time).label("jobs"))
        for row in connection.execute(statement.where(_in(state)).group_by(jobs.c.queue)):
            counts[row.queue][state] = row.jobs
    return counts


def _in(state: JobState) -> sa.ColumnElement[bool]:
    """As the indexes have it, so that they are used."""
    return jobs.c.state == sa.literal_column(f"'{state}'")


def generations(connection: sa.Connection) -> dict[str, int]:
    """Every queue that was named so far, and which generation of it is in use."""
    rows = connection.execute(sa.select(queues.c.name, queues.c.generation))
    return {row.name: row.generation for row in rows}


def add_queues(tx: Transaction, names: Iterable[str]) -> None:
    for name in sorted(set(names)):
        tx.execute(insert_or_ignore(tx.connection, queues, "name"), {"name": name})


def next_generation(tx: Transaction, queue: str, broken: int) -> int:
    """Leaves generation `broken` behind, once, however many servers find it broken."""
    tx.execute(
        sa.update(queues)
        .where(queues.c.name == queue, queues.c.generation == broken)
        .values(generation=broken + 1)
    )
    return generations(tx.connection)[queue]
