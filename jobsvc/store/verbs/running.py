"""What a worker tells of jobs that it runs: that it still does, what they report, how they end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import assert_never

import sqlalchemy as sa

from jobsvc.core.attempts import (
    AttemptFailed,
    Ending,
    Interrupted,
    Log,
    Output,
    Progress,
    Report,
    Snoozed,
    Stopped,
    Succeeded,
)
from jobsvc.core.model import Effects
from jobsvc.core.states import (
    EventType,
    JobState,
)
from jobsvc.store.batch import Batch
from jobsvc.store.database import Transaction
from jobsvc.store.locking import LockedJob, OtherChanges, lock
from jobsvc.store.rows import progress_to_json
from jobsvc.store.rules.releasing import make_room
from jobsvc.store.tables import jobs
from jobsvc.store.verbs.arrows import end_cancelled, fail

LOG_BYTES_MAX = 8 * 1024 * 1024
# What an entry counts at least: millions of empty ones are a flood too.
LOG_BYTES_MIN = 64
OUTPUT_BYTES_MAX = 8 * 1024 * 1024


def finish(
    tx: Transaction, endings: Mapping[str, tuple[str, Ending]]
) -> tuple[frozenset[str], Effects]:
    """RUNNING -> wherever the ending leads, for `endings`: job id -> (lease token, ending).

    Answers the ids whose ending was accepted; the others had lost their lease, or, `passing_over`
    locks, were locked by somebody else: `leased` tells them apart.
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
                fail(batch, job, error, retry_after, crashed)
            case Interrupted() | Snoozed() | Stopped() if job.cancel_reason is not None:
                end_cancelled(batch, job, job.cancel_reason)
            case Stopped():  # stopped for a cancel that a lost commit took away
                batch.move(job, EventType.ATTEMPT_INTERRUPTED, JobState.QUEUED)
            case Interrupted():
                batch.move(job, EventType.ATTEMPT_INTERRUPTED, JobState.QUEUED)
            case Snoozed(after):
                batch.set(job, apart=False)
                due = tx.now + timedelta(seconds=after)
                batch.move(job, EventType.SNOOZED, JobState.SCHEDULED, schedule_time=due)
            case _:
                assert_never(ending)
    make_room(batch, ended)
    return frozenset(job.id for job in ended), batch.write()


def report(
    tx: Transaction, reports: Mapping[str, tuple[str, Sequence[Report]]]
) -> tuple[frozenset[str], Effects]:
    """PROGRESS, LOG and OUTPUT of running jobs: job id -> (lease token, reports in order).

    Beyond a job's budget one last WARNING says so and the rest is dropped. Answers the ids that
    still hold their lease, as `finish` does.
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
    columns: OtherChanges
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
    if columns.get("log_bytes", 0) > LOG_BYTES_MAX:
        if job.log_bytes > LOG_BYTES_MAX:  # said already
            return
        kind, entry = EventType.LOG, _last_log("log", LOG_BYTES_MAX)
        columns = {"log_bytes": LOG_BYTES_MAX + 1}
    if columns.get("output_bytes", 0) > OUTPUT_BYTES_MAX:
        if job.output_bytes > OUTPUT_BYTES_MAX:
            return
        kind, entry = EventType.LOG, _last_log("output", OUTPUT_BYTES_MAX)
        columns = {"output_bytes": OUTPUT_BYTES_MAX + 1}
    batch.move(job, kind, JobState.RUNNING, report=entry, **columns)


def _last_log(what: str, limit: int) -> Log:
    return Log("WARNING", f"the job's {what} reached {limit} bytes; the rest is dropped")


def renew(
    tx: Transaction, leases: Mapping[str, str], lease_seconds: float
) -> dict[tuple[str, str], bool]:
    """Prolongs the leases (job id -> token) that still hold, passing over what somebody else has
    locked.

    Answers those as (job id, token) -> whether the job's cancel was requested; a lease that is
    missing there, and in what `leased` answers afterwards, is lost.
    """
    locked = (
        sa.select(jobs.c.id)
        .where(jobs.c.id.in_(sorted(leases)), jobs.c.state == JobState.RUNNING)
        .order_by(jobs.c.id)
        .with_for_update(skip_locked=True)
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


def leased(connection: sa.Connection, leases: Mapping[str, str]) -> dict[tuple[str, str], bool]:
    """The leases (job id -> token) that hold, as `renew` answers them, whoever has locked what."""
    rows = connection.execute(
        sa.select(jobs.c.id, jobs.c.lease_token, jobs.c.cancel_reason).where(
            jobs.c.id.in_(sorted(leases)), jobs.c.state == JobState.RUNNING
        )
    )
    return {
        (row.id, row.lease_token): row.cancel_reason is not None
        for row in rows
        if row.lease_token == leases[row.id]
    }
