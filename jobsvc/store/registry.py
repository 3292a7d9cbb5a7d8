"""What workers announce: job types, and themselves; and which queue of the broker carries what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta

import sqlalchemy as sa

from jobsvc.core.model import JobTypeInfo, WorkerInfo
from jobsvc.store.database import Transaction, insert_or_ignore, upsert
from jobsvc.store.tables import job_types, queues, service, workers

# A worker that was silent for this long is taken for dead, and forgotten after a day.
LIVE = timedelta(seconds=30)
FORGET = timedelta(days=1)


def announce(tx: Transaction, worker: WorkerInfo, types: Iterable[JobTypeInfo]) -> None:
    """Makes a starting worker and its job types known; of two announcements of one type the
    later stands."""
    tx.execute(
        upsert(tx, workers, "id"),
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
            upsert(tx, job_types, "name"),
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
        tx.execute(insert_or_ignore(tx, queues, "name"), {"name": name})


def heartbeat(tx: Transaction, worker_id: str) -> bool:
    """False where the worker was forgotten (it was silent for a day) and must announce itself."""
    statement = sa.update(workers).where(workers.c.id == worker_id)
    return tx.execute(statement.values(heartbeat_time=tx.now)).rowcount == 1


def retire(tx: Transaction, worker_id: str) -> None:
    tx.execute(sa.delete(workers).where(workers.c.id == worker_id))


def worker_ids(connection: sa.Connection) -> list[str]:
    """Every worker that announced itself and did not retire."""
    return list(connection.execute(sa.select(workers.c.id)).scalars())


def forget_dead(tx: Transaction) -> None:
    tx.execute(sa.delete(workers).where(workers.c.heartbeat_time < tx.now - FORGET))


def load_types(connection: sa.Connection) -> dict[str, JobTypeInfo]:
    return {
        row.name: JobTypeInfo(
            name=row.name,
            description=row.description,
            payload_schema=row.payload_schema,
            queue=row.queue,
            max_attempts=row.max_attempts,
            timeout=row.timeout,
        )
        for row in connection.execute(sa.select(job_types))
    }


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


def generations(connection: sa.Connection) -> dict[str, int]:
    """Every queue that was named so far, and which generation of it is in use."""
    rows = connection.execute(sa.select(queues.c.name, queues.c.generation))
    return {row.name: row.generation for row in rows}


def add_queues(tx: Transaction, names: Iterable[str]) -> None:
    for name in sorted(set(names)):
        tx.execute(insert_or_ignore(tx, queues, "name"), {"name": name})


def next_generation(tx: Transaction, queue: str, broken: int) -> int:
    """Leaves generation `broken` behind, once, however many servers find it broken."""
    tx.execute(
        sa.update(queues)
        .where(queues.c.name == queue, queues.c.generation == broken)
        .values(generation=broken + 1)
    )
    return generations(tx.connection)[queue]
