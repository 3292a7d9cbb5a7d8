"""What workers announce: job types, and themselves; and which queue of the broker carries what."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.model import WorkerInfo
from jobsvc.core.operations import JobType, Worker
from jobsvc.core.states import JobState
from jobsvc.store.database import Transaction
from jobsvc.store.dialects.clock import clock
from jobsvc.store.dialects.statements import insert_or_ignore, upsert
from jobsvc.store.tables import job_types, jobs, queues, service, workers

# A worker that was silent for this long is taken for dead, and forgotten after a day.
LIVE = timedelta(seconds=30)
FORGET = timedelta(days=1)

# As the indexes have it, so that they are used.
RUNNING = jobs.c.state == sa.literal_column(f"'{JobState.RUNNING}'")


def announce(tx: Transaction, worker: WorkerInfo, types: Iterable[JobTypeInfo]) -> None:
    """Makes a starting worker and its job types known; of two announcements of one type the
    later stands."""
    tx.execute(
        upsert(tx.connection, workers, "id"),
        {
            "id": worker.worker_id,
            "host": worker.host,
            "pid": worker.pid,
            "version": worker.version,
            "queues": list(worker.queues),
            "job_types": list(worker.job_types),
            "concurrency": worker.concurrency,
            "prefetch": worker.prefetch,
            "start_time": tx.now,
            "heartbeat_time": tx.now,
        },
    )
    known = load_types(tx.connection)
    changed = [t for t in sorted(types, key=lambda t: t.name) if known.get(t.name) != t]
    if changed:
        tx.execute(
            upsert(tx.connection, job_types, "name"),
            [
                {
                    "name": t.name,
                    "description": t.description,
                    "payload_schema": t.payload_schema,
                    "queue": t.queue,
                    "max_attempts": t.max_attempts,
                    "timeout": t.timeout,
                }
                for t in changed
            ],
        )
        tx.execute(sa.update(service).values(registry_revision=service.c.registry_revision + 1))
    for name in sorted(worker.queues):
        tx.execute(insert_or_ignore(tx.connection, queues, "name"), {"name": name})


def heartbeat(
    tx: Transaction,
    worker_id: str,
    claimed_ago: float | None = None,
    unacknowledged: Mapping[str, int] | None = None,
) -> bool:
    """False where the worker was forgotten (it was silent for a day) and must announce itself.

    It also says how many seconds ago it last claimed a job, and by queue how many messages it has
    not acknowledged.
    """
    values: dict[str, Any] = {"heartbeat_time": tx.now, "unacknowledged": unacknowledged or {}}
    if claimed_ago is not None:
        values["claim_time"] = tx.now - timedelta(seconds=claimed_ago)
    statement = sa.update(workers).where(workers.c.id == worker_id).values(values)
    return tx.execute(statement).rowcount == 1


def retire(tx: Transaction, worker_id: str) -> None:
    tx.execute(sa.delete(workers).where(workers.c.id == worker_id))


def worker_ids(connection: sa.Connection) -> list[str]:
    """Every worker that announced itself and did not retire."""
    return list(connection.execute(sa.select(workers.c.id)).scalars())


def forget_dead(tx: Transaction) -> None:
    dead = sa.select(workers.c.id).where(workers.c.heartbeat_time < tx.now - FORGET)
    free = dead.with_for_update(skip_locked=True)
    tx.execute(sa.delete(workers).where(workers.c.id.in_(free)))


def load_types(connection: sa.Connection) -> dict[str, JobTypeInfo]:
    return {row.name: _type(row) for row in connection.execute(sa.select(job_types))}


def _type(row: sa.Row[Any]) -> JobTypeInfo:
    return JobTypeInfo(
        name=row.name,
        description=row.description,
        payload_schema=row.payload_schema,
        queue=row.queue,
        max_attempts=row.max_attempts,
        timeout=row.timeout,
    )


def registry_revision(connection: sa.Connection) -> int:
    return int(connection.execute(sa.select(service.c.registry_revision)).scalar_one())


def live_types(tx: Transaction) -> frozenset[tuple[str, str]]:
    """(queue, job type) of everything that some live worker runs."""
    rows = tx.execute(
        sa.select(workers.c.queues, workers.c.job_types).where(
            workers.c.heartbeat_time > tx.now - LIVE
        )
    )
    return frozenset(
        (queue, job_type) for row in rows for queue in row.queues for job_type in row.job_types
    )


def live_prefetch(tx: Transaction, queue: str) -> int:
    """How many messages of `queue` the live workers may hold unacknowledged."""
    rows = tx.execute(
        sa.select(workers.c.queues, workers.c.prefetch).where(
            workers.c.heartbeat_time > tx.now - LIVE
        )
    )
    return sum(row.prefetch for row in rows if queue in row.queues)


def live_workers(connection: sa.Connection, now: datetime) -> Counter[str]:
    """By queue, how many consume it."""
    statement = sa.select(workers.c.queues).where(workers.c.heartbeat_time > now - LIVE)
    return Counter(name for row in connection.execute(statement) for name in row.queues)


def unacknowledged_messages(connection: sa.Connection, now: datetime) -> Counter[str]:
    """By queue, how many the live workers hold, as they last said."""
    statement = sa.select(workers.c.unacknowledged).where(workers.c.heartbeat_time > now - LIVE)
    held: Counter[str] = Counter()
    for told in connection.execute(statement).scalars():
        held.update(told)
    return held


def list_workers(connection: sa.Connection, after: str, limit: int) -> list[Worker]:
    """The up to `limit` workers that follow `after`, by id: whoever announced itself, did not
    retire, and said something within the last day."""
    rows = connection.execute(
        sa.select(workers).where(workers.c.id > after).order_by(workers.c.id).limit(limit)
    ).all()
    running: defaultdict[str, list[str]] = defaultdict(list)
    found = sa.select(jobs.c.worker_id, jobs.c.id).where(
        RUNNING, jobs.c.worker_id.in_([row.id for row in rows])
    )
    for job in connection.execute(found.order_by(jobs.c.id)):
        running[job.worker_id].append(job.id)
    return [
        Worker(
            worker_id=row.id,
            host=row.host,
            pid=row.pid,
            version=row.version,
            queues=tuple(row.queues),
            job_types=tuple(row.job_types),
            concurrency=row.concurrency,
            start_time=row.start_time,
            heartbeat_time=row.heartbeat_time,
            claim_time=row.claim_time,
            running=tuple(running[row.id]),
        )
        for row in rows
    ]


def list_types(connection: sa.Connection, after: str, limit: int) -> list[JobType]:
    """The up to `limit` job types that follow `after`, by name, as they were announced."""
    rows = connection.execute(
        sa.select(job_types).where(job_types.c.name > after).order_by(job_types.c.name).limit(limit)
    )
    live = sa.select(workers.c.job_types).where(workers.c.heartbeat_time > clock(connection) - LIVE)
    counts = Counter(name for names in connection.execute(live).scalars() for name in set(names))
    return [JobType(_type(row), counts[row.name]) for row in rows]
