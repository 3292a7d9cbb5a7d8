"""Storing new jobs: many requests, of many callers, in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa

from jobsvc.core.attempts import JobTypeInfo
from jobsvc.core.model import Effects, Job, NewJob, OnConflict
from jobsvc.core.states import EventType, JobState
from jobsvc.errors import IdempotencyKeyReused, UniqueConflict
from jobsvc.store.batch import Batch
from jobsvc.store.database import Transaction
from jobsvc.store.dialects.clock import clock
from jobsvc.store.dialects.statements import insert_many, insert_or_ignore
from jobsvc.store.locking import LockedJob
from jobsvc.store.reads.lookups import get_jobs
from jobsvc.store.rows import job_from_row, label_rows
from jobsvc.store.rules.uniqueness import Holders, Key, active, lock_holders
from jobsvc.store.tables import idempotency_keys, job_labels, jobs
from jobsvc.store.verbs.arrows import expire_one, replace_waiting

DEFAULT_QUEUE = "default"
DEFAULT_MAX_ATTEMPTS = 10
DEFAULT_TIMEOUT_SECONDS = 30 * 60.0
KEY_LIFETIME = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Submitted:
    """`job` is None where an idempotency key outlived its job; it has no payload. `replaced`: the
    jobs that held its unique key and were cancelled for it."""

    job_id: str
    job: Job | None
    already_existed: bool = False
    replaced: tuple[str, ...] = ()


Answer = Submitted | IdempotencyKeyReused | UniqueConflict


def submit(
    tx: Transaction, requests: Sequence[NewJob], types: Mapping[str, JobTypeInfo]
) -> tuple[list[Answer], Effects]:
    """Stores each request as a job with its first event and a message owed to the broker.

    Answers in the order of `requests`, each of which sees those before it. One that is refused is
    answered with the error and changes nothing, so the others stand. An idempotency key that was
    used before is looked at before anything else. One that comes with a unique key names the job
    that the request was answered with, whoever that is; of a refused request it stays free.
    """
    taken, used = _take_keys(tx, requests)
    unique = [request for request in requests if request.unique is not None]
    keys, replaced = map(_unique_key, unique), map(_unique_key, filter(_replaces, unique))
    holders, _ = lock_holders(tx, set(keys), set(replaced))
    call = _Call(Batch(tx), holders, dict(used))
    decided = [call.decide(request, types.get(request.job_type)) for request in requests]
    effects = call.write(taken)
    earlier = get_jobs(tx.connection, [job_id for _, job_id in used.values()])
    return [call.show(answer, earlier) for answer in decided], effects


@dataclass(slots=True)
class _Call:
    """Decides one request after the other, and writes what follows in the end."""

    batch: Batch
    holders: Holders
    names: dict[str, tuple[bytes, str]]  # idempotency key -> (request hash, job id)
    rows: list[dict[str, Any]] = field(default_factory=list)
    # By id: the jobs of `rows`, and those that hold a unique key and answer for another.
    jobs: dict[str, Any] = field(default_factory=dict)

    def decide(self, request: NewJob, job_type: JobTypeInfo | None) -> Answer:
        """Without the job to show, which a later request may still change."""
        key = request.idempotency_key
        if key is not None and key in self.names:
            return _by_name(request, *self.names[key])
        held = self.holders.of(_unique_key(request)) if request.unique is not None else []
        answer = _conflict(request, held)
        if answer is None:
            answer = self._store(request, job_type, held)
        elif isinstance(answer, Submitted):
            self.jobs[answer.job_id] = held[0]
        if key is not None and isinstance(answer, Submitted):
            self.names[key] = request.request_hash, answer.job_id
        return answer

    def _store(
        self, request: NewJob, job_type: JobTypeInfo | None, held: Sequence[Any]
    ) -> Submitted:
        tx = self.batch.tx
        replaced = replace_waiting(self.batch, held, request.job_id, request.actor)
        row = new_row(tx.now, tx.x, request, job_type)
        job = LockedJob({**UNSET, **row})
        self.rows.append(row)
        self.jobs[job.id] = job
        self.batch.record(job, EventType.SUBMITTED, actor=request.actor)
        if job.expire_time is not None and job.expire_time <= tx.now:
            expire_one(self.batch, job)
        if request.unique is not None:
            self.holders.add(job)
        return Submitted(job.id, None, replaced=replaced)

    def write(self, taken: Mapping[str, tuple[bytes, str]]) -> Effects:
        """`taken`: the idempotency keys as they were taken; they become what `names` says."""
        tx = self.batch.tx
        insert_many(tx.connection, jobs, self.rows)
        labels = [each for row in self.rows for each in label_rows(row["id"], row["labels"])]
        insert_many(tx.connection, job_labels, labels)
        for row in self.rows:
            if (job := self.jobs[row["id"]]).state == JobState.QUEUED:
                self.batch.dispatch_new(job)
        if wrong := [key for key, name in taken.items() if self.names.get(key) != name]:
            tx.execute(sa.delete(idempotency_keys).where(idempotency_keys.c.key.in_(wrong)))
            right = [_key_row(tx.now, k, *self.names[k]) for k in wrong if k in self.names]
            insert_many(tx.connection, idempotency_keys, right)
        return self.batch.write()

    def show(self, answer: Answer, earlier: Mapping[str, Job]) -> Answer:
        if not isinstance(answer, Submitted):
            return answer
        job = self.jobs.get(answer.job_id)
        return replace(answer, job=job_from_row(job) if job else earlier.get(answer.job_id))


def _unique_key(request: NewJob) -> Key:
    assert request.unique is not None
    return request.job_type, request.unique.key


def _replaces(request: NewJob) -> bool:
    return request.unique is not None and request.unique.on_conflict is OnConflict.REPLACE


def _by_name(request: NewJob, request_hash: bytes, job_id: str) -> Answer:
    """What a request gets whose idempotency key is in use."""
    if request_hash != request.request_hash:
        return IdempotencyKeyReused(job_id)
    return Submitted(job_id, None, already_existed=True)


def _conflict(request: NewJob, held: Sequence[Any]) -> Answer | None:
    """What a request gets whose unique key others hold; None: it is to be stored."""
    if request.unique is None or not held or _replaces(request):
        return None
    if request.unique.on_conflict is OnConflict.REJECT:
        return UniqueConflict(held[0].id)
    return Submitted(held[0].id, None, already_existed=True)


def new_row(now: datetime, x: int, request: NewJob, job_type: JobTypeInfo | None) -> dict[str, Any]:
    """The row of a new job, with the defaults of its type and of the service filled in."""
    due = request.schedule_time or now
    if request.delay is not None:
        due = now + timedelta(seconds=request.delay)
    expire_time = request.expire_time
    if request.ttl is not None:
        expire_time = now + timedelta(seconds=request.ttl)
    waits = due > now
    return {
        **timeless_columns(request, job_type),
        "state": JobState.SCHEDULED if waits else JobState.QUEUED,
        "create_time": now,
        "schedule_time": due if waits else now,
        "expire_time": expire_time,
        "last_sequence": 1,
        "last_x": x,
        "queued_time": None if waits else now,
        "dispatch_time": None if waits else now,
    }


def timeless_columns(request: NewJob, job_type: JobTypeInfo | None) -> dict[str, Any]:
    """Those of a new job's columns that do not depend on when it is stored."""
    unique, concurrency = request.unique, request.concurrency
    known = job_type or JobTypeInfo(request.job_type)
    return {
        "id": request.job_id,
        "job_type": request.job_type,
        "queue": request.queue or known.queue or DEFAULT_QUEUE,
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
    }


def preview(connection: sa.Connection, request: NewJob, job_type: JobTypeInfo | None) -> Answer:
    """What `submit` would answer, with nothing stored: a job that would be new under no id."""
    keys = [request.idempotency_key] if request.idempotency_key is not None else []
    for named in find_keys(connection, keys).values():
        answer = _by_name(request, *named)
        if isinstance(answer, Submitted):
            stored = get_jobs(connection, [answer.job_id])
            return replace(answer, job=stored.get(answer.job_id))
        return answer
    if request.unique is not None:
        key = _unique_key(request)
        held = Holders(active(connection, [key])).of(key)
        conflict = _conflict(request, held)
        if isinstance(conflict, Submitted):
            return replace(conflict, job=job_from_row(held[0]))
        if conflict is not None:
            return conflict
    row = new_row(clock(connection), 0, request, job_type) | {"id": "", "last_sequence": 0}
    return Submitted("", job_from_row(SimpleNamespace(**UNSET, **row)))


# What a new row leaves to the database.
UNSET: dict[str, Any] = {
    "attempt": 0,
    "start_time": None,
    "finish_time": None,
    "purge_time": None,
    "next_attempt_time": None,
    "progress": None,
    "error": None,
    "worker_id": None,
    "cancel_reason": None,
    "held": False,
    "held_for": None,
}


def _take_keys(
    tx: Transaction, requests: Sequence[NewJob]
) -> tuple[dict[str, tuple[bytes, str]], dict[str, tuple[bytes, str]]]:
    """Takes the idempotency keys of `requests` that are free, each for the first request that has
    it. Answers those, and those that are in use: key -> (request hash, job id).

    Keys are inserted in sorted order: two servers with the same keys in opposite order would
    deadlock.
    """
    first: dict[str, NewJob] = {}
    for request in requests:
        if request.idempotency_key is not None:
            first.setdefault(request.idempotency_key, request)
    if not first:
        return {}, {}
    wanted = {key: (first[key].request_hash, first[key].job_id) for key in sorted(first)}
    statement = insert_or_ignore(tx.connection, idempotency_keys, "key").returning(
        idempotency_keys.c.key
    )
    taken: set[str] = set()
    used: dict[str, tuple[bytes, str]] = {}
    # Once more for a key that was in use, and that the purge deleted before it was looked at.
    while left := [key for key in wanted if key not in taken and key not in used]:
        rows = [_key_row(tx.now, key, *wanted[key]) for key in left]
        taken |= {row.key for row in tx.execute(statement, rows)}
        used |= find_keys(tx.connection, [key for key in left if key not in taken])
    return {key: wanted[key] for key in taken}, used


def _key_row(now: datetime, key: str, request_hash: bytes, job_id: str) -> dict[str, Any]:
    return {
        "key": key,
        "request_hash": request_hash,
        "job_id": job_id,
        "expire_time": now + KEY_LIFETIME,
    }


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
