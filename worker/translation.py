"""The pool's words for the store's, and back: tasks, reports, outcomes."""

from __future__ import annotations

from typing import assert_never

from jobsvc.core.model import (
    AttemptFailed,
    Claimed,
    Ending,
    Input,
    Interrupted,
    JobError,
    Log,
    Output,
    Progress,
    Report,
    Snoozed,
    Stopped,
    Succeeded,
)
from worker import outcome as ran


def to_task(claimed: Claimed, key: str) -> ran.Task:
    """`key`: what the pool is to know the attempt by."""
    return ran.Task(
        token=key,
        job_id=claimed.job_id,
        job_type=claimed.job_type,
        attempt=claimed.attempt,
        payload=claimed.input.data,
        content_type=claimed.input.content_type,
        idempotency_token=claimed.job_id,
        timeout_seconds=claimed.timeout,
        trace_id=claimed.trace_id,
    )


def to_report(report: ran.Report) -> Report:
    match report:
        case ran.ProgressReport(current, total, message):
            return Progress(current, total or 0.0, message)
        case ran.LogReport(level, message):
            return Log(level, message)
        case ran.OutputReport(text, data):
            return Output(text, data)
        case _:
            assert_never(report)


def to_ending(outcome: ran.Outcome) -> Ending:
    match outcome:
        case ran.Succeeded(result, content_type):
            return Succeeded(Input(result, content_type))
        case ran.Failed(error, retry_after):
            return AttemptFailed(_to_error(error), retry_after)
        case ran.WorkerLost(error):
            return AttemptFailed(_to_error(error), crashed=True)
        case ran.Snoozed(after):
            return Snoozed(after)
        case ran.Cancelled():
            return Stopped()
        case ran.Interrupted():
            return Interrupted()
        case _:
            assert_never(outcome)


def _to_error(error: ran.ErrorInfo) -> JobError:
    return JobError(error.type, error.message, error.traceback, error.retryable)
