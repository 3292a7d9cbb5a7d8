"""Rows to values and back: the one place that knows how a value lies in its columns."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from jobsvc.core.attempts import Input, JobError, Log, Output, Progress, Report
from jobsvc.core.model import (
    Concurrency,
    Job,
    JobEvent,
    OnConflict,
    RetryPolicy,
    Unique,
    UniqueScope,
)
from jobsvc.core.states import EventType, JobState
from jobsvc.store.dialects.reading import id_text, json_text, microseconds, moment
from jobsvc.store.tables import job_events, jobs

_STATES = {state.value: state for state in JobState}
_EVENT_TYPES = {kind.value: kind for kind in EventType}
_NOTHING: dict[str, Any] = {}

# All that a Job shows; the payload (up to 1 MiB) only where it was asked for.
_HIDDEN = {
    *("payload", "payload_content_type", "result", "result_content_type"),
    *("lease_token", "lease_expire_time", "held", "held_for", "log_bytes", "output_bytes"),
    *("span_id", "queued_time", "dispatch_time", "dispatch_count"),
    *("failures", "crashes", "retention", "error_type", "error_time", "last_x"),
}
JOB_COLUMNS = tuple(c for c in jobs.c if c.name not in _HIDDEN)
JOB_COLUMNS_WITH_PAYLOAD = (*JOB_COLUMNS, jobs.c.payload, jobs.c.payload_content_type)


def job_from_row(row: Any, *, payload: bool = False) -> Job:
    """`row`: a Row, or any object with JOB_COLUMNS as attributes."""
    return Job(
        job_id=row.id,
        job_type=row.job_type,
        queue=row.queue,
        state=JobState(row.state),
        priority=row.priority,
        attempt=row.attempt,
        max_attempts=row.max_attempts,
        retry_policy=policy_from_row(row),
        timeout=row.timeout,
        create_time=row.create_time,
        last_sequence=row.last_sequence,
        input=Input(row.payload, row.payload_content_type) if payload else None,
        labels=row.labels,
        idempotency_key=row.idempotency_key,
        unique=unique_from_row(row),
        concurrency=concurrency_from_row(row),
        schedule_time=row.schedule_time,
        start_time=row.start_time,
        finish_time=row.finish_time,
        next_attempt_time=row.next_attempt_time,
        expire_time=row.expire_time,
        purge_time=row.purge_time,
        progress=Progress(**row.progress) if row.progress else None,
        error=JobError(**row.error) if row.error else None,
        worker_id=row.worker_id or "",
        cancel_requested=row.cancel_reason is not None,
        trace_id=row.trace_id,
    )


def brief_columns(sqlite: bool) -> tuple[sa.ColumnElement[Any], ...]:
    """What `brief_job` takes, for a Read."""
    of = jobs.c
    error: sa.ColumnElement[Any] = of.error.op("-")(sa.literal_column("'traceback'"))
    if sqlite:
        error = sa.func.json_remove(of.error, "$.traceback")
    return (
        id_text(of.id, sqlite).label("job_id"),
        *(of.job_type, of.queue, of.state, of.priority, of.attempt, of.max_attempts),
        *(of.initial_backoff, of.backoff_multiplier, of.max_backoff, of.jitter, of.timeout),
        *(of.last_sequence, of.idempotency_key, of.worker_id, of.trace_id),
        *(of.unique_key, of.unique_scope, of.unique_on_conflict),
        *(of.concurrency_key, of.concurrency_max),
        of.cancel_reason.is_not(None).label("cancel_requested"),
        *(json_text(each, sqlite).label(each.name) for each in (of.labels, of.progress)),
        json_text(error, sqlite).label("error"),
        *(microseconds(of[name], sqlite).label(name) for name in _TIMES),
    )


_TIMES = (
    *("create_time", "schedule_time", "start_time", "finish_time", "next_attempt_time"),
    *("expire_time", "purge_time"),
)


def brief_job(values: Sequence[Any]) -> Job:
    """From the values of `brief_columns`: without payload and traceback."""
    job_id, job_type, queue, state, priority, attempt, max_attempts = values[:7]
    last_sequence, key, worker_id, trace_id = values[12:16]
    unique_key, scope, on_conflict, concurrency_key, concurrency_max = values[16:21]
    cancel_requested, labels, progress, error = values[21:25]
    times = [None if each is None else moment(each) for each in values[26:]]
    scheduled, started, finished, next_attempt, expires, purged = times
    return Job(
        job_id=job_id,
        job_type=job_type,
        queue=queue,
        state=_STATES[state],
        priority=priority,
        attempt=attempt,
        max_attempts=max_attempts,
        retry_policy=_policy(*values[7:11]),
        timeout=values[11],
        create_time=moment(values[25]),
        last_sequence=last_sequence,
        labels={} if labels == "{}" else json.loads(labels),
        idempotency_key=key,
        unique=Unique(unique_key, UniqueScope(scope), OnConflict(on_conflict)) if scope else None,
        concurrency=Concurrency(concurrency_key, concurrency_max) if concurrency_key else None,
        schedule_time=scheduled,
        start_time=started,
        finish_time=finished,
        next_attempt_time=next_attempt,
        expire_time=expires,
        purge_time=purged,
        progress=Progress(**json.loads(progress)) if progress else None,
        error=JobError(**json.loads(error)) if error else None,
        worker_id=worker_id or "",
        cancel_requested=bool(cancel_requested),
        trace_id=trace_id,
    )


# Few are in use, and each is the same for many jobs.
_policy = functools.lru_cache(maxsize=256)(RetryPolicy)


def unique_from_row(row: Any) -> Unique | None:
    if row.unique_key is None:
        return None
    return Unique(row.unique_key, UniqueScope(row.unique_scope), OnConflict(row.unique_on_conflict))


def concurrency_from_row(row: Any) -> Concurrency | None:
    if row.concurrency_key is None:
        return None
    return Concurrency(row.concurrency_key, row.concurrency_max)


def policy_from_row(row: Any) -> RetryPolicy:
    return RetryPolicy(row.initial_backoff, row.backoff_multiplier, row.max_backoff, row.jitter)


def error_to_json(error: JobError) -> dict[str, Any]:
    return {
        "type": error.type,
        "message": error.message,
        "traceback": error.traceback,
        "retryable": error.retryable,
    }


def progress_to_json(progress: Progress) -> dict[str, Any]:
    return {
        "current": progress.current,
        "total": progress.total,
        "message": progress.message,
    }


def event_detail(
    *,
    error: JobError | None = None,
    report: Report | None = None,
    next_attempt_time: datetime | None = None,
    actor: str = "",
) -> dict[str, Any] | None:
    detail: dict[str, Any] = {}
    if error is not None:
        detail["error"] = error_to_json(error)
    if next_attempt_time is not None:
        detail["next_attempt_time"] = next_attempt_time.isoformat()
    if actor:
        detail["actor"] = actor
    match report:
        case None:
            pass
        case Progress():
            detail["progress"] = progress_to_json(report)
        case Log(level, message):
            detail["log"] = {"level": level, "message": message}
        case Output(text, data) if data is not None:
            detail["output"] = {"data": base64.b64encode(data).decode()}
        case Output(text):
            detail["output"] = {"text": text}
    return detail or None


def event_columns(
    sqlite: bool, events: sa.FromClause = job_events
) -> tuple[sa.ColumnElement[Any], ...]:
    """What `event` takes, for a Read. `events`: the table, or some of it."""
    of = events.c
    return (
        id_text(of.job_id, sqlite).label("job_id"),
        *(of.sequence, of.type, of.state),
        microseconds(of.event_time, sqlite).label("event_time"),
        *(of.attempt, of.worker_id),
        json_text(of.detail, sqlite).label("detail"),
    )


def event(values: Sequence[Any]) -> JobEvent:
    """From the values of `event_columns`."""
    job_id, sequence, kind, state, time, attempt, worker_id, text = values
    detail: dict[str, Any] = json.loads(text) if text else _NOTHING
    due = detail.get("next_attempt_time")
    return JobEvent(
        job_id=job_id,
        sequence=sequence,
        type=_EVENT_TYPES[kind],
        event_time=moment(time),
        state=_STATES[state],
        attempt=attempt,
        worker_id=worker_id or "",
        error=JobError(**detail["error"]) if "error" in detail else None,
        report=_report_from(detail),
        next_attempt_time=datetime.fromisoformat(due) if due else None,
        actor=detail.get("actor", ""),
    )


def _report_from(detail: dict[str, Any]) -> Report | None:
    if "progress" in detail:
        return Progress(**detail["progress"])
    if "log" in detail:
        return Log(**detail["log"])
    if "output" in detail:
        output = detail["output"]
        if "data" in output:
            return Output(data=base64.b64decode(output["data"]))
        return Output(text=output["text"])
    return None


def label_rows(job_id: str, labels: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value, "job_id": job_id} for key, value in labels.items()]
