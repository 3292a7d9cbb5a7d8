"""Rows to values and back: the one place that knows how a value lies in its columns."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from jobsvc.core.model import (
    Concurrency,
    Input,
    Job,
    JobError,
    JobEvent,
    Log,
    OnConflict,
    Output,
    Progress,
    Report,
    RetryPolicy,
    Unique,
    UniqueScope,
)
from jobsvc.core.states import EventType, JobState
from jobsvc.store.tables import job_events, jobs

# All that a Job shows; the payload (up to 1 MiB) only where it was asked for.
_HIDDEN = {
    *("payload", "payload_content_type", "result", "result_content_type"),
    *("lease_token", "lease_expire_time", "held", "held_for", "log_bytes", "output_bytes"),
    *("span_id", "queued_time", "dispatch_time", "dispatch_count"),
    *("failures", "crashes", "retention", "error_type", "error_time", "last_x"),
}
JOB_COLUMNS = tuple(c for c in jobs.c if c.name not in _HIDDEN)
JOB_COLUMNS_WITH_PAYLOAD = (*JOB_COLUMNS, jobs.c.payload, jobs.c.payload_content_type)
EVENT_COLUMNS = tuple(job_events.c)


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


def event_from_row(row: sa.Row[Any]) -> JobEvent:
    detail: dict[str, Any] = row.detail or {}
    due = detail.get("next_attempt_time")
    return JobEvent(
        job_id=row.job_id,
        sequence=row.sequence,
        type=EventType(row.type),
        event_time=row.event_time,
        state=JobState(row.state),
        attempt=row.attempt,
        worker_id=row.worker_id or "",
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
