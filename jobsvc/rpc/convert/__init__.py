"""Protobuf messages to the model and back. Requests must have passed jobsvc.rpc.validate."""

from jobsvc.rpc.convert.jobs import (
    event,
    events_page,
    heartbeat_seconds,
    job,
    job_filter,
    job_update,
    job_with_payload,
    new_job,
    result,
    run_response,
    submit_response,
    wait_seconds,
    watch_response,
)
from jobsvc.rpc.convert.schedules import (
    new_schedule,
    schedule,
    schedule_changes,
    stored_request,
)

__all__ = [
    "event",
    "events_page",
    "heartbeat_seconds",
    "job",
    "job_filter",
    "job_update",
    "job_with_payload",
    "new_job",
    "new_schedule",
    "result",
    "run_response",
    "schedule",
    "schedule_changes",
    "stored_request",
    "submit_response",
    "wait_seconds",
    "watch_response",
]
