"""The Python client: sync, typed, with deadlines, retries and resuming inside.

with Client("127.0.0.1:50051") as client:
    job = client.submit("demo.echo", {"hello": "world"}).job
    for event in client.watch(job.job_id):
        print(event.sequence, event_name(event.type))
    print(from_value(client.result(job.job_id).result))
"""

from generated.jobsvc.v1.job_pb2 import Job, JobEvent, RetryPolicy
from generated.jobsvc.v1.job_service_pb2 import (
    GetResultResponse,
    SubmitJobRequest,
    SubmitJobResponse,
)
from jobsvc.client.client import Client
from jobsvc.client.convert import (
    INTEGER_MAX,
    JobOptions,
    event_name,
    from_value,
    is_terminal,
    log_level_name,
    new_job,
    state_name,
    to_json,
)
from jobsvc.client.errors import CallFailed

__all__ = [
    "INTEGER_MAX",
    "CallFailed",
    "Client",
    "GetResultResponse",
    "Job",
    "JobEvent",
    "JobOptions",
    "RetryPolicy",
    "SubmitJobRequest",
    "SubmitJobResponse",
    "event_name",
    "from_value",
    "is_terminal",
    "log_level_name",
    "new_job",
    "state_name",
    "to_json",
]
