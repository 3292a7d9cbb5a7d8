"""What clients change: cancel, retry, update, delete, one job or many."""

from __future__ import annotations

from collections.abc import Callable, Collection

import sqlalchemy as sa

from jobsvc.core.model import Effects, Job, JobUpdate, OnConflict
from jobsvc.core.states import (
    RETRYABLE_STATES,
    TERMINAL_STATES,
    WAITING_STATES,
    EventType,
    JobState,
)
from jobsvc.errors import JobStateForbids, JobUnknown, UniqueConflict
from jobsvc.store.batch import Batch
from jobsvc.store.database import Transaction
from jobsvc.store.dialects.statements import insert_many
from jobsvc.store.locking import LockedJob, OtherChanges, lock
from jobsvc.store.rows import job_from_row, label_rows
from jobsvc.store.rules.uniqueness import key_of, lock_holders
from jobsvc.store.tables import job_labels, jobs
from jobsvc.store.verbs.arrows import end_cancelled, remove, replace_waiting

# Of many jobs: what each has become, or why it was left alone. Unknown ones, and those that are not
# wanted, are missing.
Answers = dict[str, Job | JobStateForbids | UniqueConflict]
Wanted = Callable[[LockedJob], bool]


def everything(_job: LockedJob) -> bool:
    return True


def cancel(tx: Transaction, job_id: str, reason: str, actor: str) -> tuple[Job, Effects]:
    """A waiting job ends CANCELLED at once; of a running one the cancel is requested.

    Raises JobUnknown, and JobStateForbids where the job ended otherwise.
    """
    answers, effects = cancel_many(tx, [job_id], reason, actor)
    return _only(job_id, answers), effects


def cancel_many(
    tx: Transaction,
    job_ids: Collection[str],
    reason: str,
    actor: str,
    wanted: Wanted = everything,
) -> tuple[Answers, Effects]:
    """The same for each of `job_ids` that is `wanted` once it is locked."""
    batch = Batch(tx)
    answers: Answers = {}
    for job in filter(wanted, lock(tx, job_ids).values()):
        if job.state in WAITING_STATES:
            end_cancelled(batch, job, reason, actor)
        elif job.state == JobState.RUNNING and job.cancel_reason is None:
            batch.move(
                job,
                EventType.CANCEL_REQUESTED,
                JobState.RUNNING,
                actor=actor,
                cancel_reason=reason,
            )
        elif job.state in (JobState.SUCCEEDED, JobState.FAILED):
            why = "it has ended and cannot be cancelled"
            answers[job.id] = JobStateForbids(job.id, JobState(job.state), why)
            continue
        answers[job.id] = job_from_row(job)
    return answers, batch.write()


def retry(tx: Transaction, job_id: str, actor: str) -> tuple[Job, Effects]:
    """FAILED or CANCELLED -> QUEUED, another run with a fresh budget.

    Raises JobUnknown, JobStateForbids, and UniqueConflict where another job holds its unique key
    and is not to be replaced; to answer with that one would look as if this one had been retried.
    """
    answers, effects = retry_many(tx, [job_id], actor)
    return _only(job_id, answers), effects


def retry_many(
    tx: Transaction, job_ids: Collection[str], actor: str, wanted: Wanted = everything
) -> tuple[Answers, Effects]:
    """The same for each of `job_ids` that is `wanted` once it is locked, in their order as sorted:
    each sees those before."""
    asked = tx.execute(
        sa.select(jobs.c.job_type, jobs.c.unique_key, jobs.c.unique_on_conflict).where(
            jobs.c.id.in_(job_ids), jobs.c.unique_key.is_not(None)
        )
    ).all()
    replaced = {key_of(row) for row in asked if row.unique_on_conflict == OnConflict.REPLACE}
    holders, locked = lock_holders(tx, {key_of(row) for row in asked}, replaced, job_ids)
    batch = Batch(tx)
    answers: Answers = {}
    retried = []
    for job in (locked[job_id] for job_id in sorted(job_ids) if job_id in locked):
        if not wanted(job):
            continue
        held = holders.of(key_of(job)) if job.unique_key is not None else []
        if job.was_state not in RETRYABLE_STATES:
            why = "only a FAILED or CANCELLED job can be retried"
            answers[job.id] = JobStateForbids(job.id, JobState(job.was_state), why)
        elif held and job.unique_on_conflict != OnConflict.REPLACE:
            answers[job.id] = UniqueConflict(held[0].id)
        else:
            replace_waiting(batch, held, job.id, actor)
            _retry(batch, job, actor)
            retried.append(job)
    answers |= {job.id: job_from_row(job) for job in retried}
    return answers, batch.write()


def _retry(batch: Batch, job: LockedJob, actor: str) -> None:
    batch.set(
        job,
        failures=0,
        crashes=0,
        log_bytes=0,
        output_bytes=0,
        schedule_time=min(job.schedule_time, batch.tx.now),
        finish_time=None,
        purge_time=None,
        expire_time=None,
        cancel_reason=None,
        progress=None,
        error=None,
        error_type=None,
        error_time=None,
    )
    batch.move(job, EventType.RETRIED, JobState.QUEUED, actor=actor)


def update(tx: Transaction, job_id: str, change: JobUpdate, actor: str) -> tuple[Job, Effects]:
    """Changes a waiting job. A schedule_time ahead makes it SCHEDULED, one in the past QUEUED.

    Tells of it with one event, whether or not anything has become different: it is the call that
    is told of. Raises JobUnknown, JobStateForbids.
    """
    job = lock(tx, [job_id]).get(job_id)
    if job is None:
        raise JobUnknown(job_id)
    if job.state not in WAITING_STATES:
        raise JobStateForbids(job_id, JobState(job.state), "only a waiting job can be updated")
    batch, state = Batch(tx), JobState(job.state)
    columns: OtherChanges = {}
    if change.schedule_time is not None:
        state = JobState.SCHEDULED if change.schedule_time > tx.now else JobState.QUEUED
        columns["schedule_time"] = max(change.schedule_time, tx.now)
    if change.labels is not None:
        columns["labels"] = change.labels
        tx.execute(sa.delete(job_labels).where(job_labels.c.job_id == job_id))
        insert_many(tx.connection, job_labels, label_rows(job_id, change.labels))
    has_message = job.state == state == JobState.QUEUED and not job.held
    outdated = has_message and change.priority not in (None, job.priority)
    if change.priority is not None:
        columns["priority"] = change.priority
    batch.move(job, EventType.UPDATED, state, actor=actor, **columns)
    if outdated:  # whoever receives that message drops it
        batch.dispatch(job)
    return job_from_row(job), batch.write()


def delete(tx: Transaction, job_id: str) -> None:
    """An ended job with all that is known of it. Raises JobUnknown, JobStateForbids."""
    _only(job_id, delete_many(tx, [job_id]))


def delete_many(tx: Transaction, job_ids: Collection[str], wanted: Wanted = everything) -> Answers:
    """The same for each of `job_ids` that is `wanted` once it is locked; answers those that are
    gone as they were.

    The idempotency key stays for its time. So does what is owed to the broker: a dead letter says
    all by itself, and a message for a job that is gone is dropped.
    """
    answers: Answers = {}
    for job in filter(wanted, lock(tx, job_ids).values()):
        if job.state in TERMINAL_STATES:
            answers[job.id] = job_from_row(job)
        else:
            why = "only an ended job can be deleted; cancel it first"
            answers[job.id] = JobStateForbids(job.id, JobState(job.state), why)
    remove(tx, [job_id for job_id, answer in answers.items() if isinstance(answer, Job)])
    return answers


def _only(job_id: str, answers: Answers) -> Job:
    answer = answers.get(job_id)
    if answer is None:
        raise JobUnknown(job_id)
    if not isinstance(answer, Job):
        raise answer
    return answer
