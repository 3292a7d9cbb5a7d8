"""Why a job is not running, from what is so now: not from what it was once held for."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from jobsvc.core.operations import Explanation, WaitReason
from jobsvc.core.states import JobState
from jobsvc.errors import JobUnknown
from jobsvc.store import registry
from jobsvc.store.dialects.clock import clock
from jobsvc.store.locking import KEY, TYPE
from jobsvc.store.rules.limits import count_running, count_running_keys, load_rates
from jobsvc.store.tables import jobs, queues, workers

# How many jobs of the queue are looked at to count those that go first.
LOOK_AT_MAX = 50_000

_COLUMNS = (
    *(jobs.c.id, jobs.c.state, jobs.c.queue, jobs.c.job_type, jobs.c.priority, jobs.c.attempt),
    *(jobs.c.max_attempts, jobs.c.failures, jobs.c.worker_id, jobs.c.error_type),
    *(jobs.c.start_time, jobs.c.schedule_time, jobs.c.next_attempt_time, jobs.c.finish_time),
    *(jobs.c.cancel_reason, jobs.c.concurrency_key, jobs.c.concurrency_max),
)


def explain(connection: sa.Connection, job_id: str, broker_reachable: bool) -> Explanation:
    """Raises JobUnknown."""
    job = connection.execute(sa.select(*_COLUMNS).where(jobs.c.id == job_id)).first()
    if job is None:
        raise JobUnknown(job_id)
    match JobState(job.state):
        case JobState.RUNNING:
            return _running(job)
        case JobState.SCHEDULED:
            message = f"It is to start at {_time(job.schedule_time)}, and not before."
            return _say(job, WaitReason.NOT_DUE, message, next_time=job.schedule_time)
        case JobState.RETRYING:
            return _retrying(job)
        case JobState.QUEUED:
            return _Queued(connection, job, broker_reachable).explain()
    message = f"It ended {job.state} at {_time(job.finish_time)}."
    return _say(
        job, WaitReason.ENDED, message, finish_time=job.finish_time, error_type=job.error_type
    )


def _running(job: Any) -> Explanation:
    message = f"Attempt {job.attempt} runs on worker {job.worker_id}."
    if job.cancel_reason is not None:
        message = f"{message} Its cancel was requested."
    return _say(
        job,
        WaitReason.RUNNING,
        message,
        worker_id=job.worker_id,
        attempt=job.attempt,
        start_time=job.start_time,
    )


def _retrying(job: Any) -> Explanation:
    message = (
        f"Attempt {job.attempt} failed ({job.error_type}); "
        f"the next may start at {_time(job.next_attempt_time)}."
    )
    return _say(
        job,
        WaitReason.RETRY_BACKOFF,
        message,
        next_time=job.next_attempt_time,
        attempt=job.attempt,
        failures=job.failures,
        max_attempts=job.max_attempts,
        error_type=job.error_type,
    )


class _Queued:
    """A QUEUED job, and what is asked about it, one thing after the other until one holds."""

    def __init__(self, connection: sa.Connection, job: Any, broker_reachable: bool) -> None:
        self._connection = connection
        self._job = job
        self._broker_reachable = broker_reachable
        self._now = clock(connection)
        row = connection.execute(sa.select(queues).where(queues.c.name == job.queue)).first()
        self._queue = row  # None before anybody has named it
        self._workers = self._live_workers()

    def explain(self) -> Explanation:
        return (
            self._paused()
            or self._no_worker()
            or self._queue_limit()
            or self._rate_limit()
            or self._concurrency_limit()
            or self._behind_others()
        )

    def _live_workers(self) -> list[Any]:
        columns = workers.c.id, workers.c.queues, workers.c.job_types, workers.c.concurrency
        live = workers.c.heartbeat_time > self._now - registry.LIVE
        found = self._connection.execute(sa.select(*columns).where(live))
        return [worker for worker in found if self._job.queue in worker.queues]

    def _paused(self) -> Explanation | None:
        if self._queue is None or not self._queue.paused:
            return None
        message = f"The queue {self._job.queue} is paused: it starts nothing until it is resumed."
        return _say(self._job, WaitReason.QUEUE_PAUSED, message, queue=self._job.queue)

    def _no_worker(self) -> Explanation | None:
        job, serving = self._job, len(self._workers)
        self._workers = [worker for worker in self._workers if job.job_type in worker.job_types]
        if self._workers:
            return None
        message = (
            f"No live worker of the queue {job.queue}, of which there are {serving}, has the job "
            f"type {job.job_type}."
            if serving
            else f"No live worker serves the queue {job.queue}."
        )
        return _say(
            job,
            WaitReason.NO_WORKER,
            message,
            queue=job.queue,
            job_type=job.job_type,
            live_worker_count=serving,
        )

    def _queue_limit(self) -> Explanation | None:
        if self._queue is None or self._queue.max_running is None:
            return None
        limit = self._queue.max_running
        running = count_running(self._connection).get(self._job.queue, 0)
        if running < limit:
            return None
        queue = self._job.queue
        message = f"{running} jobs of the queue {queue} run, and no more than {limit} may."
        facts = {"queue": queue, "limit": limit, "running": running}
        return _say(self._job, WaitReason.QUEUE_LIMIT, message, **facts)

    def _rate_limit(self) -> Explanation | None:
        found = [self._queue] if self._queue is not None else []
        rate = load_rates(self._connection, found).get(self._job.queue)
        opens = rate.opens(self._now) if rate is not None else None
        if rate is None or opens is None:
            return None
        message = (
            f"No more than {rate.max_starts} jobs of the queue {self._job.queue} may start within "
            f"{rate.period:g} s; the next may at {_time(opens)}."
        )
        return _say(
            self._job,
            WaitReason.RATE_LIMIT,
            message,
            queue=self._job.queue,
            limit=rate.max_starts,
            period_seconds=f"{rate.period:g}",
            started=rate.max_starts - rate.left(self._now),
            next_time=opens,
        )

    def _concurrency_limit(self) -> Explanation | None:
        key, limit = self._job.concurrency_key, self._job.concurrency_max
        if key is None:
            return None
        running = count_running_keys(self._connection, [key]).get(key, 0)
        if running < limit:
            return None
        message = (
            f"{running} jobs of its concurrency key run, and it starts only beside fewer than "
            f"{limit}."
        )
        return _say(
            self._job,
            WaitReason.CONCURRENCY_LIMIT,
            message,
            concurrency_key=key,
            limit=limit,
            running=running,
        )

    def _behind_others(self) -> Explanation:
        """Or behind nobody: then it waits for the broker, or starts within a moment."""
        ahead, more = self._ahead()
        ids = [worker.id for worker in self._workers]
        at_work = sa.select(sa.func.count()).where(registry.RUNNING, jobs.c.worker_id.in_(ids))
        running = int(self._connection.execute(at_work).scalar_one())
        slots = sum(worker.concurrency for worker in self._workers)
        facts = {
            "queue": self._job.queue,
            "ahead_count": ahead,
            "running": running,
            "slot_count": slots,
            "live_worker_count": len(ids),
            "broker_reachable": str(self._broker_reachable).lower(),
        }
        if not ahead and running < slots and not self._broker_reachable:
            message = (
                "This server does not reach the message broker, or the broker takes no messages "
                "for want of memory or disk. The job is safe, and is handed on when that is over."
            )
            return _say(self._job, WaitReason.BROKER_UNAVAILABLE, message, **facts)
        first = f"{'At least ' if more else ''}{ahead} jobs of its queue go first"
        busy = f"{running} of the {slots} slots that could run it are taken"
        message = f"{first}; {busy}." if ahead or running >= slots else "It is about to start."
        return _say(self._job, WaitReason.BEHIND_OTHERS, message, **facts)

    def _ahead(self) -> tuple[int, bool]:
        """How many QUEUED jobs of its queue go first, and whether there may be others: those that
        wait for something else do not."""
        job = self._job
        queued = (
            sa.select(jobs.c.priority, jobs.c.id, jobs.c.held, jobs.c.held_for)
            .where(
                jobs.c.state == sa.literal_column(f"'{JobState.QUEUED}'"),
                jobs.c.queue == job.queue,
            )
            .order_by(jobs.c.dispatch_time)
            .limit(LOOK_AT_MAX)
            .subquery()
        )
        before = sa.or_(
            queued.c.priority > job.priority,
            sa.and_(queued.c.priority == job.priority, queued.c.id < job.id),
        )
        waits = sa.and_(queued.c.held, queued.c.held_for.in_([TYPE, KEY]))
        count = sa.func.count()
        found = self._connection.execute(
            sa.select(
                count.label("all"),
                count.filter(before, sa.not_(sa.func.coalesce(waits, sa.false()))).label("ahead"),
            ).select_from(queued)
        ).one()
        return found.ahead, found.all == LOOK_AT_MAX


def _say(job: Any, reason: WaitReason, message: str, **facts: Any) -> Explanation:
    told = {name: _text(value) for name, value in facts.items() if value is not None}
    return Explanation(JobState(job.state), reason, message, told)


def _text(value: Any) -> str:
    return _time(value) if isinstance(value, datetime) else str(value)


def _time(moment: datetime) -> str:
    """RFC 3339."""
    return moment.isoformat().replace("+00:00", "Z")
