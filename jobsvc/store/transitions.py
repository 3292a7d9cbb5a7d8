"""Every write to `jobs`: one verb for each arrow of core/states.py.

Each verb works inside the caller's transaction and answers what is to be told once that has
committed (`Effects`). Verbs of a worker carry the lease token; a job that no longer has it was
lost to somebody else and is left alone (the verb says which).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, assert_never

import sqlalchemy as sa

from jobsvc.core.model import (
    AttemptFailed,
    Claimed,
    Effects,
    Ending,
    Input,
    Interrupted,
    Job,
    JobError,
    JobUpdate,
    Log,
    OnConflict,
    Output,
    Progress,
    Report,
    RetryPolicy,
    Snoozed,
    Stopped,
    Succeeded,
)
from jobsvc.core.states import (
    CRASHES_MAX,
    RETRYABLE_STATES,
    TERMINAL_STATES,
    WAITING_STATES,
    EventType,
    JobState,
    backoff_seconds,
)
from jobsvc.errors import JobStateForbids, JobUnknown, UniqueConflict
from jobsvc.store import registry
from jobsvc.store.batch import OFFERED, TYPE, Batch, LockedJob, lock, lock_next
from jobsvc.store.database import Transaction, clock, insert_many
from jobsvc.store.limits import Room, rank
from jobsvc.store.releasing import make_room, release
from jobsvc.store.rows import job_from_row, policy_from_row, progress_to_json
from jobsvc.store.tables import idempotency_keys, job_events, job_labels, jobs
from jobsvc.store.uniqueness import key_of, lock_holders

LOG_BYTES_MAX = 8 * 1024 * 1024
# What an entry counts at least: millions of empty ones are a flood too.
LOG_BYTES_MIN = 64
OUTPUT_BYTES_MAX = 8 * 1024 * 1024
# A message of a type that its receiver cannot run goes round again after this long.
OTHER_TYPE_DELAY = timedelta(seconds=1)
# A resume token of a fleet watcher is good for an hour, the shortest retention, from when it was
# made; what ended just before that, in a transaction that took its time, may come after it.
PURGE_GRACE = timedelta(minutes=1)


# Of many jobs: what each has become, or why it was left alone. Unknown ones, and those that are not
# wanted, are missing.
Answers = dict[str, Job | JobStateForbids | UniqueConflict]
Wanted = Callable[[LockedJob], bool]


def everything(_job: LockedJob) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class ClaimResult:
    claimed: tuple[Claimed, ...]
    effects: Effects


def claim(
    tx: Transaction,
    job_ids: Iterable[str],
    types: frozenset[str],
    worker_id: str,
    token: str,
    lease_seconds: float,
    priorities: Mapping[str, int] | None = None,
) -> ClaimResult:
    """QUEUED -> RUNNING for those of `job_ids` that are due and of a type in `types`.

    Waits for row locks: passing over a locked row would drop its message while somebody only
    keeps books on it. `token` is new and random for each call. Called again with the same token
    (after a COMMIT of unknown outcome) it also answers what that call had claimed. `priorities`
    are those of the messages: a job that has another one by now has a newer message, too, and is
    left for that.
    """
    batch = Batch(tx)
    claimed = []
    locked = lock(tx, job_ids, jobs.c.payload, jobs.c.payload_content_type)
    latest = (job for job in locked.values() if _is_latest(job, priorities))
    starting = _pick(batch, [job for job in latest if job.state == JobState.QUEUED], types)
    for job in locked.values():
        if job.state == JobState.RUNNING and job.lease_token == token:
            claimed.append(_claimed(job, token, 0.0))
        elif job.id in starting:
            waited = (tx.now - job.queued_time).total_seconds()
            batch.move(
                job,
                EventType.STARTED,
                JobState.RUNNING,
                attempt=job.attempt + 1,
                start_time=tx.now,
                worker_id=worker_id,
                lease_token=token,
                lease_expire_time=tx.now + timedelta(seconds=lease_seconds),
                progress=None,
                held=False,
                held_for=None,
            )
            claimed.append(_claimed(job, token, waited))
    return ClaimResult(tuple(claimed), batch.write())


def _pick(batch: Batch, queued: list[LockedJob], types: frozenset[str]) -> set[str]:
    """Which of the QUEUED jobs start; the others expire, are passed on, or held."""
    offered = [job for job in queued if job.held_for == OFFERED]
    room = Room.of(batch.tx, queued, asking=True)
    if room is not None:
        # It may have waited for those whose places it takes: they ended before these start.
        batch.tx.now = max(batch.tx.now, clock(batch.tx.connection))
    starting = set()
    others = []
    for job in sorted(queued, key=rank):
        if job.expire_time is not None and job.expire_time <= batch.tx.now:
            expire_one(batch, job)
        elif job.job_type not in types:
            others.append(job)
        elif room is not None and (refused := room.take(job)) is not None:
            batch.hold(job, refused)
        else:
            starting.add(job.id)
    _pass_on(batch, others)
    if room is not None:
        room.write_starts()
        # The places of what was offered one and does not start are for others.
        if left := [job for job in offered if job.held_for != OFFERED]:
            keys = Counter(job.concurrency_key for job in left if job.concurrency_key is not None)
            release(batch, room, room.limited & {job.queue for job in left}, keys, len(left))
    return starting


def _is_latest(job: LockedJob, priorities: Mapping[str, int] | None) -> bool:
    return priorities is None or priorities[job.id] == job.priority


def _claimed(job: LockedJob, token: str, waited: float) -> Claimed:
    return Claimed(
        job_id=job.id,
        token=token,
        job_type=job.job_type,
        queue=job.queue,
        attempt=job.attempt,
        input=Input(job.payload, job.payload_content_type),
        timeout=job.timeout,
        trace_id=job.trace_id,
        span_id=job.span_id,
        waited=waited,
    )


def _pass_on(batch: Batch, others: list[LockedJob]) -> None:
    """Jobs that the receiver has no handler for: to another worker, or held until one has it."""
    if not others:
        return
    live = registry.live_types(batch.tx)
    for job in others:
        if (job.queue, job.job_type) in live:
            batch.dispatch(job, OTHER_TYPE_DELAY)
        else:
            batch.hold(job, TYPE)


def finish(
    tx: Transaction, endings: Mapping[str, tuple[str, Ending]]
) -> tuple[frozenset[str], Effects]:
    """RUNNING -> wherever the ending leads, for `endings`: job id -> (lease token, ending).

    Answers the ids whose ending was accepted; the others had lost their lease.
    """
    batch = Batch(tx)
    ended = []
    for job in lock(tx, endings).values():
        token, ending = endings[job.id]
        if job.state != JobState.RUNNING or job.lease_token != token:
            continue
        ended.append(job)
        match ending:
            case Succeeded(result):
                batch.move(
                    job,
                    EventType.SUCCEEDED,
                    JobState.SUCCEEDED,
                    result=result.data,
                    result_content_type=result.content_type,
                )
            case AttemptFailed(error, retry_after, crashed):
                _fail(batch, job, error, retry_after, crashed)
            case Interrupted() | Snoozed() | Stopped() if job.cancel_reason is not None:
                _cancelled(batch, job, job.cancel_reason)
            case Stopped():  # stopped for a cancel that a lost commit took away
                batch.move(job, EventType.ATTEMPT_INTERRUPTED, JobState.QUEUED)
            case Interrupted():
                batch.move(job, EventType.ATTEMPT_INTERRUPTED, JobState.QUEUED)
            case Snoozed(after):
                due = tx.now + timedelta(seconds=after)
                batch.move(job, EventType.SNOOZED, JobState.SCHEDULED, schedule_time=due)
            case _:
                assert_never(ending)
    make_room(batch, ended)
    return frozenset(job.id for job in ended), batch.write()


def _fail(
    batch: Batch,
    job: LockedJob,
    error: JobError,
    retry_after: float | None = None,
    crashed: bool = False,
) -> None:
    failures, crashes = job.failures + 1, job.crashes + crashed
    counted = {"failures": failures, "crashes": crashes}
    if not error.retryable or failures >= job.max_attempts or crashes >= CRASHES_MAX:
        batch.move(job, EventType.ATTEMPT_FAILED, JobState.RUNNING, error=error, **counted)
        batch.move(job, EventType.FAILED, JobState.FAILED, error=error)
    elif job.cancel_reason is not None:  # it would wait again otherwise
        batch.move(job, EventType.ATTEMPT_FAILED, JobState.RUNNING, error=error, **counted)
        _cancelled(batch, job, job.cancel_reason)
    else:
        seconds = retry_after if retry_after is not None else _backoff(job, failures)
        due = batch.tx.now + timedelta(seconds=seconds)
        batch.move(
            job,
            EventType.ATTEMPT_FAILED,
            JobState.RETRYING,
            error=error,
            next_attempt_time=due,
            **counted,
        )


def _backoff(job: LockedJob, failures: int) -> float:
    policy: RetryPolicy = policy_from_row(job)
    return backoff_seconds(
        failures,
        policy.initial_backoff,
        policy.backoff_multiplier,
        policy.max_backoff,
        policy.jitter,
    )


def _cancelled(batch: Batch, job: LockedJob, reason: str, actor: str = "") -> None:
    error = JobError("CANCELLED", reason or "cancelled by request")
    batch.move(job, EventType.CANCELLED, JobState.CANCELLED, error=error, actor=actor)


def expire_one(batch: Batch, job: LockedJob) -> None:
    error = JobError("EXPIRED", "its expire_time passed before an attempt could start")
    batch.move(job, EventType.FAILED, JobState.FAILED, error=error)


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
            _cancelled(batch, job, reason, actor)
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
    columns: dict[str, Any] = {}
    if change.schedule_time is not None:
        state = JobState.SCHEDULED if change.schedule_time > tx.now else JobState.QUEUED
        columns["schedule_time"] = max(change.schedule_time, tx.now)
    if change.labels is not None:
        columns["labels"] = change.labels
        tx.execute(sa.delete(job_labels).where(job_labels.c.job_id == job_id))
        insert_many(tx, job_labels, label_rows(job_id, change.labels))
    has_message = job.state == state == JobState.QUEUED and not job.held
    outdated = has_message and change.priority not in (None, job.priority)
    if change.priority is not None:
        columns["priority"] = change.priority
    batch.move(job, EventType.UPDATED, state, actor=actor, **columns)
    if outdated:  # whoever receives that message drops it
        batch.dispatch(job)
    return job_from_row(job), batch.write()


def label_rows(job_id: str, labels: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value, "job_id": job_id} for key, value in labels.items()]


def replace_waiting(
    batch: Batch, holders: Iterable[Any], job_id: str, actor: str
) -> tuple[str, ...]:
    """Those that wait end CANCELLED for the sake of `job_id`; answers their ids. What runs is
    left."""
    waiting = [job for job in holders if job.state in WAITING_STATES]
    for job in waiting:
        _cancelled(batch, job, f"replaced by job {job_id}", actor)
    return tuple(job.id for job in waiting)


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
    _remove(tx, [job_id for job_id, answer in answers.items() if isinstance(answer, Job)])
    return answers


def _remove(tx: Transaction, job_ids: Sequence[str]) -> None:
    if job_ids:
        tx.execute(sa.delete(job_events).where(job_events.c.job_id.in_(job_ids)))
        tx.execute(sa.delete(job_labels).where(job_labels.c.job_id.in_(job_ids)))
        tx.execute(sa.delete(jobs).where(jobs.c.id.in_(job_ids)))


def _only(job_id: str, answers: Answers) -> Job:
    answer = answers.get(job_id)
    if answer is None:
        raise JobUnknown(job_id)
    if not isinstance(answer, Job):
        raise answer
    return answer


def report(
    tx: Transaction, reports: Mapping[str, tuple[str, Sequence[Report]]]
) -> tuple[frozenset[str], Effects]:
    """PROGRESS, LOG and OUTPUT of running jobs: job id -> (lease token, reports in order).

    Beyond a job's budget one last WARNING says so and the rest is dropped. Answers the ids that
    still hold their lease.
    """
    batch = Batch(tx)
    held = set()
    for job in lock(tx, reports).values():
        token, entries = reports[job.id]
        if job.state == JobState.RUNNING and job.lease_token == token:
            held.add(job.id)
            for entry in entries:
                _report(batch, job, entry)
    return frozenset(held), batch.write()


def _report(batch: Batch, job: LockedJob, entry: Report) -> None:
    columns: dict[str, Any]
    match entry:
        case Progress():
            kind, columns = EventType.PROGRESS, {"progress": progress_to_json(entry)}
        case Log(_, message):
            kind = EventType.LOG
            size = max(len(message.encode()), LOG_BYTES_MIN)
            columns = {"log_bytes": job.log_bytes + size}
        case Output():
            kind = EventType.OUTPUT
            columns = {"output_bytes": job.output_bytes + entry.size}
        case _:
            assert_never(entry)
    for column, limit in (("log_bytes", LOG_BYTES_MAX), ("output_bytes", OUTPUT_BYTES_MAX)):
        if columns.get(column, 0) > limit:
            if getattr(job, column) > limit:  # said already
                return
            what = column.removesuffix("_bytes")
            entry = Log("WARNING", f"the job's {what} reached {limit} bytes; the rest is dropped")
            kind, columns = EventType.LOG, {column: limit + 1}
    batch.move(job, kind, JobState.RUNNING, report=entry, **columns)


def renew(
    tx: Transaction, leases: Mapping[str, str], lease_seconds: float
) -> dict[tuple[str, str], bool]:
    """Prolongs the leases (job id -> token) that still hold.

    Answers those as (job id, token) -> whether the job's cancel was requested; a lease that is
    missing there is lost.
    """
    locked = (
        sa.select(jobs.c.id)
        .where(jobs.c.id.in_(sorted(leases)), jobs.c.state == JobState.RUNNING)
        .order_by(jobs.c.id)
        .with_for_update()
        .cte("locked")
    )
    rows = tx.execute(
        sa.update(jobs)
        .where(
            jobs.c.id.in_(sa.select(locked.c.id)),
            jobs.c.state == JobState.RUNNING,
            jobs.c.lease_token.in_(sorted(set(leases.values()))),
        )
        .values(lease_expire_time=tx.now + timedelta(seconds=lease_seconds))
        .returning(jobs.c.id, jobs.c.lease_token, jobs.c.cancel_reason)
    )
    return {(row.id, row.lease_token): row.cancel_reason is not None for row in rows}


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
    """RUNNING with a lease that ran out: a failed attempt like any other, and a crash."""
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
    for job in lost:
        error = JobError(
            "WORKER_LOST", f"worker {job.worker_id} stopped renewing its lease", retryable=True
        )
        _fail(batch, job, error, crashed=True)
    make_room(batch, lost)
    return batch.write()


def purge(tx: Transaction, limit: int) -> int:
    """Deletes ended jobs past their purge_time with their events, and idempotency keys past
    theirs whose job is gone. Answers the count of jobs."""
    doomed = [
        row.id
        for row in tx.execute(
            sa.select(jobs.c.id)
            .where(jobs.c.purge_time <= tx.now - PURGE_GRACE)
            .order_by(jobs.c.purge_time)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
    ]
    _remove(tx, doomed)
    keys = (
        sa.select(idempotency_keys.c.key)
        .where(
            idempotency_keys.c.expire_time <= tx.now,
            ~sa.exists().where(jobs.c.id == idempotency_keys.c.job_id),
        )
        .limit(limit)
    )
    tx.execute(sa.delete(idempotency_keys).where(idempotency_keys.c.key.in_(keys)))
    return len(doomed)
