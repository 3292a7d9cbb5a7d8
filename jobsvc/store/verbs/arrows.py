"""Arrows that several verbs take: what a failed attempt, a cancel and an expiration lead to.

Each records its events in the caller's `Batch`; nothing is written before `Batch.write`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from jobsvc.core.attempts import JobError
from jobsvc.core.model import RetryPolicy
from jobsvc.core.states import (
    CRASHES_MAX,
    WAITING_STATES,
    EventType,
    JobState,
    backoff_seconds,
)
from jobsvc.store.batch import Batch
from jobsvc.store.database import Transaction
from jobsvc.store.locking import LockedJob, OtherChanges
from jobsvc.store.rows import policy_from_row
from jobsvc.store.tables import job_events, job_labels, jobs


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker that stopped renewing a job's lease. `others`: how many more jobs it ran. `dead`:
    as far as anybody knows."""

    others: int
    dead: bool


def fail(
    batch: Batch,
    job: LockedJob,
    error: JobError,
    retry_after: float | None = None,
    crashed: bool = False,
    lost: Lost | None = None,
) -> None:
    """`lost`: with its worker. Who was not alone in it may be none of the reason, and is not given
    up for that."""
    failures, crashes = job.failures + 1, job.crashes + crashed
    suspected = lost is not None and lost.dead
    counted: OtherChanges = {"failures": failures, "crashes": crashes, "apart": suspected}
    given_up = crashes >= CRASHES_MAX and (lost is None or not lost.others)
    if not error.retryable or failures >= job.max_attempts or given_up:
        batch.move(job, EventType.ATTEMPT_FAILED, JobState.RUNNING, error=error, **counted)
        batch.move(job, EventType.FAILED, JobState.FAILED, error=error)
    elif job.cancel_reason is not None:  # it would wait again otherwise
        batch.move(job, EventType.ATTEMPT_FAILED, JobState.RUNNING, error=error, **counted)
        end_cancelled(batch, job, job.cancel_reason)
    else:
        seconds = retry_after if retry_after is not None else _backoff(job, failures)
        due = batch.tx.now + timedelta(seconds=seconds)
        counted["next_attempt_time"] = due
        batch.move(job, EventType.ATTEMPT_FAILED, JobState.RETRYING, error=error, **counted)


def _backoff(job: LockedJob, failures: int) -> float:
    policy: RetryPolicy = policy_from_row(job)
    return backoff_seconds(
        failures,
        policy.initial_backoff,
        policy.backoff_multiplier,
        policy.max_backoff,
        policy.jitter,
    )


def end_cancelled(batch: Batch, job: LockedJob, reason: str, actor: str = "") -> None:
    error = JobError("CANCELLED", reason or "cancelled by request")
    batch.move(job, EventType.CANCELLED, JobState.CANCELLED, error=error, actor=actor)


def expire_one(batch: Batch, job: LockedJob) -> None:
    error = JobError("EXPIRED", "its expire_time passed before an attempt could start")
    batch.move(job, EventType.FAILED, JobState.FAILED, error=error)


def replace_waiting(
    batch: Batch, holders: Iterable[Any], job_id: str, actor: str
) -> tuple[str, ...]:
    """Those that wait end CANCELLED for the sake of `job_id`; answers their ids. What runs is
    left."""
    waiting = [job for job in holders if job.state in WAITING_STATES]
    for job in waiting:
        end_cancelled(batch, job, f"replaced by job {job_id}", actor)
    return tuple(job.id for job in waiting)


def remove(tx: Transaction, job_ids: Sequence[str]) -> None:
    if job_ids:
        tx.execute(sa.delete(job_events).where(job_events.c.job_id.in_(job_ids)))
        tx.execute(sa.delete(job_labels).where(job_labels.c.job_id.in_(job_ids)))
        tx.execute(sa.delete(jobs).where(jobs.c.id.in_(job_ids)))
