"""Every read of jobs and their history."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from jobsvc.core.attempts import Input, JobError
from jobsvc.core.model import Job, JobEvent, JobOutcome
from jobsvc.core.states import JobState
from jobsvc.errors import JobUnknown
from jobsvc.store.dialects.reading import Read, id_text, one_of
from jobsvc.store.rows import (
    JOB_COLUMNS,
    JOB_COLUMNS_WITH_PAYLOAD,
    event,
    event_columns,
    job_from_row,
)
from jobsvc.store.tables import JobId, job_events, jobs

Cursor = tuple[str, int]  # a job, and the sequence of its events after which to go on


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
    given = {"id": job_id, "after": after, "limit": limit}
    return [event(row) for row in _list_events(connection, given)]


@Read
def _list_events(sqlite: bool) -> sa.Select[Any]:
    return (
        sa.select(*event_columns(sqlite))
        .where(
            job_events.c.job_id == sa.bindparam("id"), job_events.c.sequence > sa.bindparam("after")
        )
        .order_by(job_events.c.sequence)
        .limit(sa.bindparam("limit", type_=sa.Integer))
    )


def heads(connection: sa.Connection, job_ids: Sequence[str]) -> dict[str, tuple[int, JobState]]:
    """Job id -> (last sequence, state), for those that exist."""
    return by_job(_heads(connection, {"ids": list(job_ids)}))


def by_job(rows: Iterable[Sequence[Any]]) -> dict[str, tuple[int, JobState]]:
    return {job_id: (last, JobState(state)) for job_id, last, state in rows}


@Read
def _heads(sqlite: bool) -> sa.Select[Any]:
    columns = id_text(jobs.c.id, sqlite).label("id"), jobs.c.last_sequence, jobs.c.state
    return sa.select(*columns).where(one_of(jobs.c.id, "ids", sqlite))


def events_after(
    connection: sa.Connection, cursors: Sequence[Cursor], limit: int
) -> dict[Cursor, list[JobEvent]]:
    """For each (job id, sequence) the up to `limit` events that follow it, in order. On SQLite.

    Sequences have no gaps, so a range of numbers bounds the count of rows. Since a job's row lock
    orders its commits, what is read is a gapless prefix of what follows.
    """
    given = json.dumps([[job_id.replace("-", ""), after] for job_id, after in cursors])
    return by_cursor(connection.execute(_EVENTS_AFTER, {"cursors": given, "limit": limit}))


def by_cursor(rows: Iterable[Sequence[Any]]) -> dict[Cursor, list[JobEvent]]:
    found: dict[Cursor, list[JobEvent]] = {}
    for after, *values in rows:
        read = event(values)
        found.setdefault((read.job_id, after), []).append(read)
    return found


def _select_events_after() -> sa.Select[Any]:
    each = sa.func.json_each(sa.bindparam("cursors")).table_valued("value")
    given = sa.select(
        sa.type_coerce(sa.func.json_extract(each.c.value, "$[0]"), JobId).label("id"),
        sa.type_coerce(sa.func.json_extract(each.c.value, "$[1]"), sa.BigInteger).label("number"),
    ).subquery("given")
    after = given.c.number
    return (
        sa.select(after, *event_columns(sqlite=True))
        .join(job_events, job_events.c.job_id == given.c.id)
        .where(
            job_events.c.sequence > after,
            job_events.c.sequence <= after + sa.bindparam("limit", type_=sa.Integer),
        )
        .order_by(job_events.c.job_id, after, job_events.c.sequence)
    )


_EVENTS_AFTER = _select_events_after()
