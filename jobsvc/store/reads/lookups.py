"""Every read of jobs and their history."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from jobsvc.core.model import Input, Job, JobError, JobEvent, JobOutcome
from jobsvc.core.states import JobState
from jobsvc.errors import JobUnknown
from jobsvc.store.dialects.statements import pairs
from jobsvc.store.rows import (
    EVENT_COLUMNS,
    JOB_COLUMNS,
    JOB_COLUMNS_WITH_PAYLOAD,
    event_from_row,
    job_from_row,
)
from jobsvc.store.tables import job_events, jobs


def get_job(connection: sa.Connection, job_id: str) -> Job:
    """With its payload. Raises JobUnknown."""
    row = connection.execute(
        sa.select(*JOB_COLUMNS_WITH_PAYLOAD).where(jobs.c.id == job_id)
    ).first()
    if row is None:
        raise JobUnknown(job_id)
    return job_from_row(row, payload=True)


def get_jobs(connection: sa.Connection, job_ids: Sequence[str]) -> dict[str, Job]:
    """Those that exist, without payloads."""
    if not job_ids:
        return {}
    rows = connection.execute(sa.select(*JOB_COLUMNS).where(jobs.c.id.in_(job_ids)))
    return {row.id: job_from_row(row) for row in rows}


def get_outcome(connection: sa.Connection, job_id: str) -> JobOutcome:
    """Raises JobUnknown. While the job has not ended: its state alone."""
    row = connection.execute(
        sa.select(jobs.c.state, jobs.c.error, jobs.c.result, jobs.c.result_content_type).where(
            jobs.c.id == job_id
        )
    ).first()
    if row is None:
        raise JobUnknown(job_id)
    state = JobState(row.state)
    if state is JobState.SUCCEEDED:
        return JobOutcome(job_id, state, result=Input(row.result, row.result_content_type))
    if state.terminal:
        return JobOutcome(job_id, state, error=JobError(**row.error))
    return JobOutcome(job_id, state)


def list_events(connection: sa.Connection, job_id: str, after: int, limit: int) -> list[JobEvent]:
    rows = connection.execute(
        sa.select(*EVENT_COLUMNS)
        .where(job_events.c.job_id == job_id, job_events.c.sequence > after)
        .order_by(job_events.c.sequence)
        .limit(limit)
    )
    return [event_from_row(row) for row in rows]


def heads(connection: sa.Connection, job_ids: Sequence[str]) -> dict[str, tuple[int, JobState]]:
    """Job id -> (last sequence, state), for those that exist."""
    rows = connection.execute(
        sa.select(jobs.c.id, jobs.c.last_sequence, jobs.c.state).where(jobs.c.id.in_(job_ids))
    )
    return {row.id: (row.last_sequence, JobState(row.state)) for row in rows}


def events_after(
    connection: sa.Connection, cursors: Sequence[tuple[str, int]], limit: int
) -> dict[tuple[str, int], list[JobEvent]]:
    """For each (job id, sequence) the up to `limit` events that follow it, in order.

    Sequences have no gaps, so a range of numbers bounds the count of rows. Since a job's row lock
    orders its commits, what is read is a gapless prefix of what follows.
    """
    given = pairs(connection, [c[0] for c in cursors], [c[1] for c in cursors])
    rows = connection.execute(
        sa.select(given.c.number.label("after"), *EVENT_COLUMNS)
        .join(job_events, job_events.c.job_id == given.c.id)
        .where(
            job_events.c.sequence > given.c.number,
            job_events.c.sequence <= given.c.number + limit,
        )
        .order_by(job_events.c.job_id, given.c.number, job_events.c.sequence)
    )
    found: dict[tuple[str, int], list[JobEvent]] = {}
    for row in rows:
        found.setdefault((row.job_id, row.after), []).append(event_from_row(row))
    return found
