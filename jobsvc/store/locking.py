"""Locked rows of `jobs`: typed, so that a column that there is not is found before it runs.

`LockedJob` has what whoever locks a job will want to know, `JobChanges` what may be set of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypedDict, Unpack

import sqlalchemy as sa

from jobsvc.core.states import JobState
from jobsvc.store.database import Transaction
from jobsvc.store.dialects.clock import NUMBER
from jobsvc.store.rows import JOB_COLUMNS
from jobsvc.store.tables import jobs

# What jobs.held_for can say.
TYPE, QUEUE, KEY, OFFERED = "TYPE", "QUEUE", "KEY", "OFFERED"

LOCK_COLUMNS = (
    *JOB_COLUMNS,
    *(jobs.c.failures, jobs.c.crashes, jobs.c.retention, jobs.c.lease_token, jobs.c.held),
    *(jobs.c.held_for, jobs.c.last_x, jobs.c.apart),
    *(
        jobs.c.log_bytes,
        jobs.c.output_bytes,
        jobs.c.dispatch_count,
        jobs.c.queued_time,
        jobs.c.span_id,
    ),
)


class OtherChanges(TypedDict, total=False):
    """Columns that may be set together with an arrow, which sets the others of `JobChanges`."""

    priority: int
    labels: dict[str, str]
    attempt: int
    failures: int
    crashes: int
    apart: bool
    schedule_time: datetime
    start_time: datetime | None
    finish_time: datetime | None
    next_attempt_time: datetime | None
    expire_time: datetime | None
    purge_time: datetime | None
    progress: dict[str, Any] | None
    error_type: str | None
    error_time: datetime | None
    result: bytes
    result_content_type: str | None
    worker_id: str | None
    lease_token: str | None
    lease_expire_time: datetime | None
    cancel_reason: str | None
    held: bool
    held_for: str | None
    last_sequence: int
    last_x: int
    log_bytes: int
    output_bytes: int
    queued_time: datetime | None
    dispatch_time: datetime | None
    dispatch_count: int


class JobChanges(OtherChanges, total=False):
    """Columns that may be set."""

    state: JobState
    error: dict[str, Any] | None


class LockedJob:
    """A locked row of `jobs`, or one that is about to be: its columns as attributes, as they are
    to be. `changed`: those that are to be written."""

    id: str
    job_type: str
    queue: str
    state: JobState
    priority: int
    labels: dict[str, str]
    attempt: int
    failures: int
    crashes: int
    apart: bool
    max_attempts: int
    initial_backoff: float
    backoff_multiplier: float
    max_backoff: float
    jitter: float
    timeout: float
    retention: float | None
    idempotency_key: str | None
    unique_key: str | None
    unique_scope: str | None
    unique_on_conflict: str | None
    concurrency_key: str | None
    concurrency_max: int | None
    trace_id: str
    span_id: str
    create_time: datetime
    schedule_time: datetime
    start_time: datetime | None
    finish_time: datetime | None
    next_attempt_time: datetime | None
    expire_time: datetime | None
    purge_time: datetime | None
    progress: dict[str, Any] | None
    error: dict[str, Any] | None
    worker_id: str | None
    lease_token: str | None
    cancel_reason: str | None
    held: bool
    held_for: str | None
    last_sequence: int
    last_x: int
    log_bytes: int
    output_bytes: int
    queued_time: datetime | None
    dispatch_count: int
    # Only where they were asked for beside LOCK_COLUMNS.
    payload: bytes
    payload_content_type: str | None

    def __init__(self, row: Mapping[Any, Any]) -> None:
        vars(self).update(row)
        self.state = JobState(row["state"])
        self.was_state = self.state
        self.was_last_sequence: int = row["last_sequence"]
        self.changed = JobChanges()

    def set(self, **columns: Unpack[JobChanges]) -> None:
        vars(self).update(columns)
        self.changed.update(columns)


def passing_over(tx: Transaction) -> Transaction:
    """From now on `lock` waits for nobody in this transaction. What is not among the jobs that it
    answers may be there, and locked by somebody else."""
    tx.waits = False
    return tx


def lock(tx: Transaction, ids: Iterable[str], *extra: sa.Column[Any]) -> dict[str, LockedJob]:
    """Locks the jobs of `ids` that exist, waiting for whoever holds them."""
    statement = sa.select(*_columns(tx), *extra).where(jobs.c.id.in_(sorted(ids)))
    rows = tx.execute(statement.order_by(jobs.c.id).with_for_update(skip_locked=not tx.waits))
    return {job.id: job for job in _locked(tx, rows)}


def lock_next(
    tx: Transaction,
    limit: int,
    order: sa.ColumnElement[Any] | tuple[sa.ColumnElement[Any], ...],
    *where: sa.ColumnElement[bool],
) -> list[LockedJob]:
    """Locks up to `limit` jobs that match, passing over those that somebody else holds."""
    ordered = order if isinstance(order, tuple) else (order,)
    statement = sa.select(*_columns(tx)).where(*where).order_by(*ordered).limit(limit)
    return _locked(tx, tx.execute(statement.with_for_update(skip_locked=True)))


def _columns(tx: Transaction) -> Sequence[sa.ColumnElement[Any]]:
    """What whoever locks a job will want to know; its transaction's number comes along."""
    sqlite = tx.connection.dialect.name == "sqlite"
    return LOCK_COLUMNS if sqlite else (*LOCK_COLUMNS, NUMBER)


def _locked(tx: Transaction, rows: sa.CursorResult[Any]) -> list[LockedJob]:
    found = rows.mappings().all()
    if found:
        tx.learn_number(found[0].get("number"))
    return [LockedJob(row) for row in found]
