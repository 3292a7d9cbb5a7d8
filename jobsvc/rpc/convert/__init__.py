"""Protobuf messages to the model and back. Requests must have passed jobsvc.rpc.validate."""

from jobsvc.rpc.convert.admin import extent, failure_groups_page
from jobsvc.rpc.convert.jobs import (
    event,
    events_page,
    fleet_beat,
    fleet_event,
    get_response,
    heartbeat_seconds,
    job,
    job_filter,
    job_update,
    jobs_page,
    new_job,
    result,
    run_response,
    submit_response,
    wait_seconds,
    watch_response,
)
from jobsvc.rpc.convert.operations import explanation, job_types, limits, queue, workers
from jobsvc.rpc.convert.schedules import (
    new_schedule,
    schedule,
    schedule_changes,
    stored_request,
)

__all__ = [
    "event",
    "events_page",
    "explanation",
    "extent",
    "failure_groups_page",
    "fleet_beat",
    "fleet_event",
    "get_response",
    "heartbeat_seconds",
    "job",
    "job_filter",
    "job_types",
    "job_update",
    "jobs_page",
    "limits",
    "new_job",
    "new_schedule",
    "queue",
    "result",
    "run_response",
    "schedule",
    "schedule_changes",
    "stored_request",
    "submit_response",
    "wait_seconds",
    "watch_response",
    "workers",
]
