"""What time changes: jobs that are due, past their expiration, without a lease, or to be purged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import sqlalchemy as sa

from jobsvc.core.attempts import JobError
from jobsvc.core.model import Effects
from jobsvc.core.states import (
    WAITING_STATES,
    EventType,
    JobState,
)
from jobsvc.store import registry
from jobsvc.store.batch import Batch
from jobsvc.store.database import Transaction
from jobsvc.store.locking import LockedJob, lock_next
from jobsvc.store.rules.releasing import make_room
from jobsvc.store.tables import idempotency_keys, jobs, workers
from jobsvc.store.verbs.arrows import Lost, expire_one, fail, remove

# What ended just before a resume token of a fleet watcher was made, in a transaction that took its
# time, may come after it.
PURGE_GRACE = timedelta(minutes=1)
# What the error of a lost job says, where each of several may be why its worker died.
AMONG_OTHERS = ", and ran {} more jobs; this one runs again apart from others"


def promote(tx: Transaction, limit: int) -> tuple[int, Effects]:
    """SCHEDULED and RETRYING -> QUEUED where due."""
    scheduled = lock_next(
        tx,
        limit,
        jobs.c.schedule_time,
        jobs.c.state == JobState.SCHEDULED,
        jobs.c.schedule_time <= tx.now,
    )
    retrying = lock_next(
        tx,
        limit,
        jobs.c.next_attempt_time,
        jobs.c.state == JobState.RETRYING,
        jobs.c.next_attempt_time <= tx.now,
    )
    batch = Batch(tx)
    for job in (*scheduled, *retrying):
        if job.expire_time is not None and job.expire_time <= tx.now:
            expire_one(batch, job)
        else:
            batch.move(job, EventType.QUEUED, JobState.QUEUED)
    return max(len(scheduled), len(retrying)), batch.write()


def expire(tx: Transaction, limit: int) -> tuple[int, Effects]:
    """Waiting -> FAILED (EXPIRED) where past the expire_time."""
    due = lock_next(
        tx,
        limit,
        jobs.c.expire_time,
        jobs.c.state.in_([sa.literal_column(f"'{s}'") for s in WAITING_STATES]),
        jobs.c.expire_time <= tx.now,
    )
    batch = Batch(tx)
    for job in due:
        expire_one(batch, job)
    return len(due), batch.write()


def reap(tx: Transaction, limit: int) -> tuple[int, Effects]:
    """RUNNING with a lease that ran out: a failed attempt like any other, and a crash. Whoever ran
    in a worker that died runs again apart from all others."""
    lost = lock_next(
        tx,
        limit,
        jobs.c.lease_expire_time,
        jobs.c.state == JobState.RUNNING,
        jobs.c.lease_expire_time <= tx.now,
    )
    return len(lost), _lose(tx, lost)


def reap_workers(tx: Transaction, worker_ids: Sequence[str], limit: int) -> tuple[int, Effects]:
    """The same for all jobs of workers that are known to be gone, whatever their lease."""
    lost = lock_next(
        tx,
        limit,
        jobs.c.id,
        jobs.c.state == JobState.RUNNING,
        jobs.c.worker_id.in_(worker_ids),
    )
    return len(lost), _lose(tx, lost)


def _lose(tx: Transaction, lost: list[LockedJob]) -> Effects:
    batch = Batch(tx)
    if not lost:
        return batch.write()
    ran, stuck = _ran_beside(tx, lost), _stuck(tx, lost)
    for job in lost:
        others = ran[job.worker_id] - 1
        message = f"worker {job.worker_id} stopped renewing its lease"
        if others > 0:
            message += AMONG_OTHERS.format(others)
        error = JobError("WORKER_LOST", message, retryable=True)
        fail(batch, job, error, crashed=True, lost=Lost(others, dead=job.id not in stuck))
    make_room(batch, lost)
    return batch.write()


def _ran_beside(tx: Transaction, lost: list[LockedJob]) -> Counter[str | None]:
    """By worker, how many jobs it runs, as far as the database knows."""
    workers_of = {job.worker_id for job in lost}
    running = sa.select(jobs.c.worker_id, sa.func.count().label("count")).where(
        registry.RUNNING, jobs.c.worker_id.in_(workers_of)
    )
    rows = tx.execute(running.group_by(jobs.c.worker_id))
    return Counter({row.worker_id: row.count for row in rows})


def _stuck(tx: Transaction, lost: list[LockedJob]) -> frozenset[str]:
    """Those whose worker lives: it has told so after their lease ran out. Somebody had locked their
    row, most likely, and so kept it from renewing that."""
    alive = sa.select(jobs.c.id).join(workers, workers.c.id == jobs.c.worker_id)
    told = workers.c.heartbeat_time > jobs.c.lease_expire_time
    rows = tx.execute(alive.where(jobs.c.id.in_([job.id for job in lost]), told))
    return frozenset(rows.scalars())


def purge(tx: Transaction, limit: int, resume: timedelta) -> int:
    """Deletes ended jobs with their events, once they have been past their purge_time for as long
    as a resume token is good, and idempotency keys past their expire_time whose job is gone.
    Answers the count of jobs."""
    doomed = [
        row.id
        for row in tx.execute(
            sa.select(jobs.c.id)
            .where(jobs.c.purge_time <= tx.now - resume - PURGE_GRACE)
            .order_by(jobs.c.purge_time)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
    ]
    remove(tx, doomed)
    keys = (
        sa.select(idempotency_keys.c.key)
        .where(
            idempotency_keys.c.expire_time <= tx.now,
            ~sa.exists().where(jobs.c.id == idempotency_keys.c.job_id),
        )
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    tx.execute(sa.delete(idempotency_keys).where(idempotency_keys.c.key.in_(keys)))
    return len(doomed)
