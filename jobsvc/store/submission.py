"""Storing new jobs: many requests, of many callers, in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa

from jobsvc.core.model import Effects, Job, JobTypeInfo, NewJob
from jobsvc.core.states import EventType, JobState
from jobsvc.errors import IdempotencyKeyReused
from jobsvc.store.batch import Batch, LockedJob
from jobsvc.store.database import Transaction, insert_many, insert_or_ignore
from jobsvc.store.queries import get_jobs
from jobsvc.store.rows import job_from_row
from jobsvc.store.tables import idempotency_keys, job_labels, jobs
from jobsvc.store.transitions import expire_one

DEFAULT_QUEUE = "default"
DEFAULT_MAX_ATTEMPTS = 10
DEFAULT_TIMEOUT_SECONDS = 30 * 60.0
KEY_LIFETIME = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Submitted:
    """`job` is None where an idempotency key outlived its job; it has no payload."""

    job_id: str
    job: Job | None
    already_existed: bool = False


Answer = Submitted | IdempotencyKeyReused


def submit(
    tx: Transaction, requests: Sequence[NewJob], types: Mapping[str, JobTypeInfo]
) -> tuple[list[Answer], Effects]:
    """Stores each request as a job with its first event and a message owed to the broker.

    Answers in the order of `requests`; a request whose idempotency key was used with another one
    is answered with the error and changes nothing, so the others stand.
    """
    answers, twins = _answer_known_keys(tx, requests)
    batch = Batch(tx)
    rows = [
        new_row(tx.now, tx.x, request, types.get(request.job_type))
        for request in requests
        if request.job_id not in answers and request.job_id not in twins
    ]
    insert_many(tx, jobs, rows)
    insert_many(
        tx,
        job_labels,
        [
            {"key": key, "value": value, "job_id": row["id"]}
            for row in rows
            for key, value in row["labels"].items()
        ],
    )
    actors = {request.job_id: request.actor for request in requests}
    for row in rows:
        job: Any = SimpleNamespace(**_UNSET, **row)
        batch.record(job, EventType.SUBMITTED, actor=actors[job.id])
        if job.expire_time is not None and job.expire_time <= tx.now:
            job = LockedJob(vars(job))
            expire_one(batch, job)
        elif job.state == JobState.QUEUED:
            batch.dispatch_new(job)
        answers[job.id] = Submitted(job.id, job_from_row(job))
    for repeated, original in twins.items():
        stored = answers[original]
        assert isinstance(stored, Submitted)
        answers[repeated] = replace(stored, already_existed=True)
    return [answers[request.job_id] for request in requests], batch.write()


def new_row(now: datetime, x: int, request: NewJob, job_type: JobTypeInfo | None) -> dict[str, Any]:
    """The row of a new job, with the defaults of its type and of the service filled in."""
    unique, concurrency = request.unique, request.concurrency
    known = job_type or JobTypeInfo(request.job_type)
    due = request.schedule_time or now
    if request.delay is not None:
        due = now + timedelta(seconds=request.delay)
    expire_time = request.expire_time
    if request.ttl is not None:
        expire_time = now + timedelta(seconds=request.ttl)
    waits = due > now
    return {
        "id": request.job_id,
        "job_type": request.job_type,
        "queue": request.queue or known.queue or DEFAULT_QUEUE,
        "state": JobState.SCHEDULED if waits else JobState.QUEUED,
        "priority": request.priority,
        "payload": request.input.data,
        "payload_content_type": request.input.content_type,
        "labels": request.labels,
        "max_attempts": request.max_attempts or known.max_attempts or DEFAULT_MAX_ATTEMPTS,
        "initial_backoff": request.retry_policy.initial_backoff,
        "backoff_multiplier": request.retry_policy.backoff_multiplier,
        "max_backoff": request.retry_policy.max_backoff,
        "jitter": request.retry_policy.jitter,
        "timeout": request.timeout or known.timeout or DEFAULT_TIMEOUT_SECONDS,
        "retention": request.retention,
        "idempotency_key": request.idempotency_key,
        "unique_key": unique and unique.key,
        "unique_scope": unique and unique.scope,
        "unique_on_conflict": unique and unique.on_conflict,
        "concurrency_key": concurrency and concurrency.key,
        "concurrency_max": concurrency and concurrency.max_running,
        "trace_id": request.trace_id,
        "span_id": request.span_id,
        "create_time": now,
        "schedule_time": due if waits else now,
        "expire_time": expire_time,
        "last_sequence": 1,
        "last_x": x,
        "queued_time": None if waits else now,
        "dispatch_time": None if waits else now,
    }


def preview(now: datetime, request: NewJob, job_type: JobTypeInfo | None) -> Job:
    """The job that `submit` would store, under no id."""
    row = new_row(now, 0, request, job_type)
    return job_from_row(SimpleNamespace(**_UNSET, **(row | {"id": "", "last_sequence": 0})))


# What a new row leaves to the database.
_UNSET: dict[str, Any] = {
    "attempt": 0,
    "start_time": None,
    "finish_time": None,
    "purge_time": None,
    "next_attempt_time": None,
    "progress": None,
    "error": None,
    "worker_id": None,
    "cancel_reason": None,
}


def _answer_known_keys(
    tx: Transaction, requests: Sequence[NewJob]
) -> tuple[dict[str, Answer], dict[str, str]]:
    """Takes the idempotency keys of `requests`; answers those (by job id) that were taken before
    or clash with an earlier request here, and names for each repetition the job id it repeats.

    Keys are inserted in sorted order: two servers with the same keys in opposite order would
    deadlock.
    """
    first: dict[str, NewJob] = {}
    for request in requests:
        if request.idempotency_key is not None:
            first.setdefault(request.idempotency_key, request)
    if not first:
        return {}, {}
    rows = {
        key: {
            "key": key,
            "request_hash": first[key].request_hash,
            "job_id": first[key].job_id,
            "expire_time": tx.now + KEY_LIFETIME,
        }
        for key in sorted(first)
    }
    statement = insert_or_ignore(tx, idempotency_keys, "key").returning(idempotency_keys.c.key)
    taken: set[str] = set()
    known: dict[str, tuple[bytes, str]] = {}
    # Once more for a key that was in use, and that the purge deleted before it was looked at.
    while left := [key for key in rows if key not in taken and key not in known]:
        taken |= {row.key for row in tx.execute(statement, [rows[key] for key in left])}
        known |= find_keys(tx.connection, [key for key in left if key not in taken])
    found = get_jobs(tx.connection, [job_id for _, job_id in known.values()])
    answers: dict[str, Answer] = {}
    twins: dict[str, str] = {}
    for request in requests:
        key = request.idempotency_key
        if key is None or (key in taken and first[key] is request):
            continue
        request_hash, job_id = known.get(key) or (first[key].request_hash, first[key].job_id)
        if request_hash != request.request_hash:
            answers[request.job_id] = IdempotencyKeyReused(job_id)
        elif key in known:
            answers[request.job_id] = Submitted(job_id, found.get(job_id), already_existed=True)
        else:  # the same request twice in this call: answered once its job is stored
            twins[request.job_id] = job_id
    return answers, twins


def find_keys(connection: sa.Connection, keys: Sequence[str]) -> dict[str, tuple[bytes, str]]:
    """Those of `keys` that are in use: key -> (request hash, job id)."""
    if not keys:
        return {}
    rows = connection.execute(
        sa.select(
            idempotency_keys.c.key, idempotency_keys.c.request_hash, idempotency_keys.c.job_id
        ).where(idempotency_keys.c.key.in_(keys))
    )
    return {row.key: (row.request_hash, row.job_id) for row in rows}
