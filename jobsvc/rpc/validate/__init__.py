"""The rules of the requests. Pure: a function a request, which answers every violation at once."""

from jobsvc.rpc.validate.fields import check
from jobsvc.rpc.validate.jobs import (
    MESSAGE_BYTES_MAX,
    cancel_job,
    get_job,
    get_result,
    list_job_events,
    run_job,
    submit_job,
    submit_jobs,
    watch_job,
)

__all__ = [
    "MESSAGE_BYTES_MAX",
    "cancel_job",
    "check",
    "get_job",
    "get_result",
    "list_job_events",
    "run_job",
    "submit_job",
    "submit_jobs",
    "watch_job",
]
