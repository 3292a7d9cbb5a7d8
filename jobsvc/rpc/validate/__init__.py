"""The rules of the requests. Pure: a function a request, which answers every violation at once."""

from jobsvc.rpc.validate.admin import cancel_jobs, delete_jobs, list_failure_groups, retry_jobs
from jobsvc.rpc.validate.fields import check, page, schedule_id
from jobsvc.rpc.validate.jobs import (
    MESSAGE_BYTES_MAX,
    cancel_job,
    delete_job,
    get_job,
    get_result,
    list_job_events,
    list_jobs,
    retry_job,
    run_job,
    submit_job,
    submit_jobs,
    update_job,
    watch_job,
    watch_jobs,
)
from jobsvc.rpc.validate.operations import explain_job, queue, update_queue
from jobsvc.rpc.validate.schedules import create_schedule, scheduled_request, update_schedule
from jobsvc.rpc.validate.undecoded import undecoded

__all__ = [
    "MESSAGE_BYTES_MAX",
    "cancel_job",
    "cancel_jobs",
    "check",
    "create_schedule",
    "delete_job",
    "delete_jobs",
    "explain_job",
    "get_job",
    "get_result",
    "list_failure_groups",
    "list_job_events",
    "list_jobs",
    "page",
    "queue",
    "retry_job",
    "retry_jobs",
    "run_job",
    "schedule_id",
    "scheduled_request",
    "submit_job",
    "submit_jobs",
    "undecoded",
    "update_job",
    "update_queue",
    "update_schedule",
    "watch_job",
    "watch_jobs",
]
