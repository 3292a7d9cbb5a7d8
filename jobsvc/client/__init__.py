"""The Python client: sync, typed, with deadlines, retries and resuming inside.

with Client("127.0.0.1:50051") as client:
    job = client.submit("demo.echo", {"hello": "world"}).job
    for event in client.watch(job.job_id):
        print(event.sequence, event_name(event.type))
    print(from_value(client.wait(job.job_id).result))
"""

from generated.jobsvc.v1.admin_service_pb2 import FailureGroup, Queue, Worker
from generated.jobsvc.v1.job_pb2 import (
    Concurrency,
    Job,
    JobEvent,
    JobType,
    RetryPolicy,
    Unique,
)
from generated.jobsvc.v1.job_service_pb2 import (
    ExplainJobResponse,
    GetResultResponse,
    SubmitJobRequest,
    SubmitJobResponse,
)
from generated.jobsvc.v1.schedule_service_pb2 import MissedTicks, Overlap, Schedule
from jobsvc.client.admin import BulkResponse, QueueChanges
from jobsvc.client.client import Client
from jobsvc.client.convert import (
    INTEGER_MAX,
    FilterOptions,
    JobChanges,
    JobOptions,
    Payload,
    Span,
    event_name,
    from_value,
    is_terminal,
    log_level_name,
    new_filter,
    new_job,
    state_name,
    to_json,
    wait_reason_name,
)
from jobsvc.client.errors import CallFailed

__all__ = [
    "INTEGER_MAX",
    "BulkResponse",
    "CallFailed",
    "Client",
    "Concurrency",
    "ExplainJobResponse",
    "FailureGroup",
    "FilterOptions",
    "GetResultResponse",
    "Job",
    "JobChanges",
    "JobEvent",
    "JobOptions",
    "JobType",
    "MissedTicks",
    "Overlap",
    "Payload",
    "Queue",
    "QueueChanges",
    "RetryPolicy",
    "Schedule",
    "Span",
    "SubmitJobRequest",
    "SubmitJobResponse",
    "Unique",
    "Worker",
    "event_name",
    "from_value",
    "is_terminal",
    "log_level_name",
    "new_filter",
    "new_job",
    "state_name",
    "to_json",
    "wait_reason_name",
]
