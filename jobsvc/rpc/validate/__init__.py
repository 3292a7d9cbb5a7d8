"""The rules of the requests. Pure: a function a request, which answers every violation at once."""

from jobsvc.rpc.validate.fields import check, page, schedule_id
from jobsvc.rpc.validate.jobs import (
    MESSAGE_BYTES_MAX,
    cancel_job,
    delete_job,
    get_job,
    get_result,
    list_job_events,
    retry_job,
    run_job,
    submit_job,
    submit_jobs,
    update_job,
    watch_job,
)
from jobsvc.rpc.validate.schedules import create_schedule, scheduled_request, update_schedule

__all__ = [
    "MESSAGE_BYTES_MAX",
    "cancel_job",
    "check",
    "delete_job",
    "create_schedule",
    "get_job",
    "get_result",
    "list_job_events",
    "retry_job",
    "page",
    "run_job",
    "schedule_id",
    "scheduled_request",
    "submit_job",
    "submit_jobs",
    "update_job",
    "update_schedule",
    "watch_job",
]
