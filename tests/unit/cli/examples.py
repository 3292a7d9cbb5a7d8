"""Messages that the scripted server answers with."""

from __future__ import annotations

from typing import Any

from google.protobuf.struct_pb2 import Value

from generated.jobsvc.v1 import job_pb2
from generated.jobsvc.v1.job_pb2 import Heartbeat, Job, JobError, JobEvent, LogLine, Progress
from generated.jobsvc.v1.job_service_pb2 import GetResultResponse, WatchJobResponse

JOB_ID = "0197f3a0-0000-7000-8000-000000000001"
ENDS: dict[str, Any] = {
    "SUCCEEDED": (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_EVENT_TYPE_SUCCEEDED, 0),
    "FAILED": (job_pb2.JOB_STATE_FAILED, job_pb2.JOB_EVENT_TYPE_FAILED, 1),
    "CANCELLED": (job_pb2.JOB_STATE_CANCELLED, job_pb2.JOB_EVENT_TYPE_CANCELLED, 3),
}


def job(**fields: Any) -> Job:
    return Job(job_id=JOB_ID, job_type="t", state=job_pb2.JOB_STATE_QUEUED, **fields)


def history(end: str = "SUCCEEDED") -> list[JobEvent]:
    state, kind, _ = ENDS[end]
    running = job_pb2.JOB_STATE_RUNNING
    events = [
        JobEvent(type=job_pb2.JOB_EVENT_TYPE_SUBMITTED, state=job_pb2.JOB_STATE_QUEUED),
        JobEvent(type=job_pb2.JOB_EVENT_TYPE_STARTED, state=running, worker_id="w", attempt=1),
        JobEvent(
            type=job_pb2.JOB_EVENT_TYPE_PROGRESS,
            state=running,
            progress=Progress(current=1, total=4, message="step"),
        ),
        JobEvent(
            type=job_pb2.JOB_EVENT_TYPE_LOG,
            state=running,
            log=LogLine(level=job_pb2.LOG_LEVEL_INFO, message="two\nlines \x1b[31m"),
        ),
        JobEvent(type=kind, state=state),
    ]
    if end != "SUCCEEDED":
        events[-1].error.CopyFrom(JobError(type="Oops", message="why"))
    for sequence, event in enumerate(events, 1):
        event.job_id = JOB_ID
        event.sequence = sequence
    return events


def stream(end: str = "SUCCEEDED", after: int = 0) -> list[WatchJobResponse]:
    messages = [WatchJobResponse(heartbeat=Heartbeat())]
    return messages + [WatchJobResponse(event=event) for event in history(end)[after:]]


def result(end: str = "SUCCEEDED", value: Any = None) -> GetResultResponse:
    found = GetResultResponse(job_id=JOB_ID, state=ENDS[end][0])
    if end == "SUCCEEDED":
        found.result.CopyFrom(value or Value(number_value=42))
    else:
        found.error.CopyFrom(JobError(type="Oops", message="why\nnot"))
    return found
