"""JobService's messages to the model and back.

Requests must have passed jobsvc.rpc.validate. A Job in an answer carries its payload only where
`job_with_payload` made it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import uuid_utils
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from generated.jobsvc.v1 import job_pb2, job_service_pb2
from jobsvc.core.attempts import Input, JobError, Log, Output, Progress, Report
from jobsvc.core.model import (
    Concurrency,
    Job,
    JobEvent,
    JobFilter,
    JobOutcome,
    JobUpdate,
    NewJob,
    OnConflict,
    RetryPolicy,
    Unique,
    UniqueScope,
)
from jobsvc.core.states import EventType, JobState
from jobsvc.rpc.convert.values import duration, seconds, timestamp, to_datetime
from jobsvc.rpc.paging import PAGE_BYTES_MAX
from jobsvc.services.jobs import Submitted
from jobsvc.services.watch import Heartbeat

HEARTBEAT_SECONDS = 15.0
LAST_MOMENT = datetime.max.replace(tzinfo=UTC)

STATES = {state: job_pb2.JobState.Value(f"JOB_STATE_{state}") for state in JobState}
EVENT_TYPES = {kind: job_pb2.JobEventType.Value(f"JOB_EVENT_TYPE_{kind}") for kind in EventType}
STATE_NAMES = {number: state for state, number in STATES.items()}
UNIQUE_SCOPES = {job_pb2.UniqueScope.Value(f"UNIQUE_SCOPE_{scope}"): scope for scope in UniqueScope}
ON_CONFLICT = {job_pb2.UniqueConflict.Value(f"UNIQUE_CONFLICT_{way}"): way for way in OnConflict}
LOG_LEVELS = {
    level: job_pb2.LogLevel.Value(f"LOG_LEVEL_{level}")
    for level in ("DEBUG", "INFO", "WARNING", "ERROR")
}


# Requests.


def new_job(
    request: job_service_pb2.SubmitJobRequest, actor: str, trace_id: str, span_id: str = ""
) -> NewJob:
    when, expiration = request.WhichOneof("when"), request.WhichOneof("expiration")
    return NewJob(
        job_id=str(uuid_utils.uuid7()),
        job_type=request.job_type,
        input=_input(request),
        queue=request.queue or None,
        priority=request.priority,
        schedule_time=to_datetime(request.schedule_time) if when == "schedule_time" else None,
        delay=seconds(request.delay) if when == "delay" else None,
        expire_time=to_datetime(request.expire_time) if expiration == "expire_time" else None,
        ttl=seconds(request.ttl) if expiration == "ttl" else None,
        max_attempts=request.max_attempts or None,
        retry_policy=(
            _policy(request.retry_policy) if request.HasField("retry_policy") else RetryPolicy()
        ),
        timeout=seconds(request.timeout) if request.HasField("timeout") else None,
        idempotency_key=request.idempotency_key or None,
        request_hash=_request_hash(request) if request.idempotency_key else b"",
        unique=_unique(request.unique) if request.HasField("unique") else None,
        concurrency=(
            Concurrency(request.concurrency.key, request.concurrency.max_running)
            if request.HasField("concurrency")
            else None
        ),
        retention=seconds(request.retention) if request.HasField("retention") else None,
        labels=dict(request.labels),
        actor=actor,
        trace_id=trace_id,
        span_id=span_id,
    )


def job_update(request: job_service_pb2.UpdateJobRequest) -> JobUpdate:
    named = request.update_mask.paths
    return JobUpdate(
        priority=request.priority if "priority" in named else None,
        schedule_time=to_datetime(request.schedule_time) if "schedule_time" in named else None,
        labels=dict(request.labels) if "labels" in named else None,
    )


def wait_seconds(request: job_service_pb2.GetResultRequest) -> float:
    return seconds(request.wait)


def heartbeat_seconds(
    request: job_service_pb2.WatchJobRequest
    | job_service_pb2.WatchJobsRequest
    | job_service_pb2.RunJobRequest,
) -> float:
    if request.HasField("heartbeat_interval"):
        return seconds(request.heartbeat_interval)
    return HEARTBEAT_SECONDS


def _input(request: job_service_pb2.SubmitJobRequest) -> Input:
    match request.WhichOneof("input"):
        case "payload":
            return Input(request.payload.SerializeToString(deterministic=True))
        case "payload_blob":
            return Input(request.payload_blob.data, request.payload_blob.content_type)
    return Input()


def _policy(policy: job_pb2.RetryPolicy) -> RetryPolicy:
    default = RetryPolicy()
    initial = default.initial_backoff
    if policy.HasField("initial_backoff"):
        initial = seconds(policy.initial_backoff)
    longest = max(default.max_backoff, initial)
    if policy.HasField("max_backoff"):
        longest = seconds(policy.max_backoff)
    factor, jitter = default.backoff_multiplier, default.jitter
    if policy.HasField("backoff_multiplier"):
        factor = policy.backoff_multiplier
    if policy.HasField("jitter"):
        jitter = policy.jitter
    return RetryPolicy(initial, factor, longest, jitter)


def _unique(unique: job_pb2.Unique) -> Unique:
    return Unique(
        unique.key,
        UNIQUE_SCOPES.get(unique.scope, UniqueScope.ACTIVE),
        ON_CONFLICT.get(unique.on_conflict, OnConflict.RETURN_EXISTING),
    )


def _moment(message: Message, field: str) -> datetime | None:
    """Of stored times, which are whole microseconds, none lies between this and what was sent."""
    if not message.HasField(field):
        return None
    sent: Timestamp = getattr(message, field)
    moment = to_datetime(sent)
    cut = sent.nanos % 1_000 and moment < LAST_MOMENT
    return moment + timedelta(microseconds=1) if cut else moment


def job_filter(message: job_pb2.JobFilter) -> JobFilter:
    return JobFilter(
        states=frozenset(STATE_NAMES[state] for state in message.states),
        job_types=frozenset(message.job_types),
        queue=message.queue,
        labels=dict(message.labels),
        error_types=frozenset(message.error_types),
        idempotency_key=message.idempotency_key,
        create_time_after=_moment(message, "create_time_after"),
        create_time_before=_moment(message, "create_time_before"),
        finish_time_after=_moment(message, "finish_time_after"),
        finish_time_before=_moment(message, "finish_time_before"),
    )


def _request_hash(request: job_service_pb2.SubmitJobRequest) -> bytes:
    """Of the request as sent; whether it only validates makes no other request of it."""
    if request.validate_only:
        sent, request = request, job_service_pb2.SubmitJobRequest()
        request.CopyFrom(sent)
        request.ClearField("validate_only")
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


# Answers.


def submit_response(submitted: Submitted) -> job_service_pb2.SubmitJobResponse:
    return job_service_pb2.SubmitJobResponse(
        job=job(submitted.job) if submitted.job else job_pb2.Job(job_id=submitted.job_id),
        already_existed=submitted.already_existed,
    )


def job(job: Job) -> job_pb2.Job:
    return job_pb2.Job(
        job_id=job.job_id,
        job_type=job.job_type,
        queue=job.queue,
        state=STATES[job.state],
        labels=job.labels,
        priority=job.priority,
        attempt=job.attempt,
        max_attempts=job.max_attempts,
        retry_policy=_policy_message(job.retry_policy),
        timeout=duration(job.timeout),
        idempotency_key=job.idempotency_key or "",
        unique=_unique_message(job.unique) if job.unique else None,
        concurrency=(
            job_pb2.Concurrency(key=job.concurrency.key, max_running=job.concurrency.max_running)
            if job.concurrency
            else None
        ),
        create_time=timestamp(job.create_time),
        schedule_time=timestamp(job.schedule_time),
        start_time=timestamp(job.start_time),
        finish_time=timestamp(job.finish_time),
        next_attempt_time=timestamp(job.next_attempt_time),
        expire_time=timestamp(job.expire_time),
        purge_time=timestamp(job.purge_time),
        progress=_progress(job.progress) if job.progress else None,
        error=_error(job.error) if job.error else None,
        worker_id=job.worker_id,
        cancel_requested=job.cancel_requested,
        last_sequence=job.last_sequence,
        trace_id=job.trace_id,
    )


def job_with_payload(model: Job) -> job_pb2.Job:
    message = job(model)
    if model.input is None:
        raise ValueError(f"job {model.job_id} was read without its payload")
    if model.input.content_type is None:
        message.payload.CopyFrom(Struct.FromString(model.input.data))
    else:
        message.payload_blob.CopyFrom(_blob(model.input))
    return message


def result(outcome: JobOutcome) -> job_service_pb2.GetResultResponse:
    message = job_service_pb2.GetResultResponse(job_id=outcome.job_id, state=STATES[outcome.state])
    if outcome.error:
        message.error.CopyFrom(_error(outcome.error))
    elif outcome.result and outcome.result.content_type is None:
        message.result.CopyFrom(Value.FromString(outcome.result.data))
    elif outcome.result:
        message.result_blob.CopyFrom(_blob(outcome.result))
    return message


def event(event: JobEvent) -> job_pb2.JobEvent:
    message = job_pb2.JobEvent(
        job_id=event.job_id,
        sequence=event.sequence,
        type=EVENT_TYPES[event.type],
        event_time=timestamp(event.event_time),
        state=STATES[event.state],
        attempt=event.attempt,
        worker_id=event.worker_id,
        error=_error(event.error) if event.error else None,
        next_attempt_time=timestamp(event.next_attempt_time),
        actor=event.actor,
    )
    if event.report:
        _add_report(message, event.report)
    return message


def _add_report(message: job_pb2.JobEvent, report: Report) -> None:
    match report:
        case Progress():
            message.progress.CopyFrom(_progress(report))
        case Log(level, text):
            message.log.CopyFrom(job_pb2.LogLine(level=LOG_LEVELS[level], message=text))
        case Output(data=bytes(data)):
            message.output.CopyFrom(job_pb2.OutputChunk(data=data))
        case Output(text):
            message.output.CopyFrom(job_pb2.OutputChunk(text=text or ""))


def events_page(events: list[JobEvent], size: int) -> job_service_pb2.ListJobEventsResponse:
    """At most `size` of the events, and no more bytes than a page may have; there are more if
    some were left out."""
    page = job_service_pb2.ListJobEventsResponse()
    page_bytes = 0
    for each in events[:size]:
        message = event(each)
        page_bytes += message.ByteSize()
        if page_bytes > PAGE_BYTES_MAX and page.events:
            break
        page.events.append(message)
    if len(page.events) < len(events):
        page.next_after_sequence = page.events[-1].sequence
    return page


def jobs_page(
    jobs: Iterable[Job], last: str, *, full: bool
) -> tuple[job_service_pb2.ListJobsResponse, str]:
    """As many of the jobs as a page may have bytes; `last`, or the last that it has if some were
    left out."""
    page = job_service_pb2.ListJobsResponse()
    page_bytes = 0
    for each in jobs:
        message = job_with_payload(each) if full else job(each)
        page_bytes += message.ByteSize()
        if page_bytes > PAGE_BYTES_MAX and page.jobs:
            return page, page.jobs[-1].job_id
        page.jobs.append(message)
    return page, last


def watch_response(item: JobEvent | Heartbeat) -> job_service_pb2.WatchJobResponse:
    if isinstance(item, JobEvent):
        return job_service_pb2.WatchJobResponse(event=event(item))
    return job_service_pb2.WatchJobResponse(heartbeat=_heartbeat(item))


def fleet_event(model: JobEvent, token: str) -> bytes:
    """A WatchJobsResponse, as it goes to all who watch."""
    message = job_service_pb2.WatchJobsResponse(event=event(model), resume_token=token)
    return message.SerializeToString()


def fleet_beat(time: datetime, token: str) -> job_service_pb2.WatchJobsResponse:
    return job_service_pb2.WatchJobsResponse(
        heartbeat=_heartbeat(Heartbeat(time, 0)), resume_token=token
    )


def run_response(item: JobEvent | Heartbeat | JobOutcome) -> job_service_pb2.RunJobResponse:
    match item:
        case JobEvent():
            return job_service_pb2.RunJobResponse(event=event(item))
        case JobOutcome():
            return job_service_pb2.RunJobResponse(result=result(item))
        case Heartbeat():
            return job_service_pb2.RunJobResponse(heartbeat=_heartbeat(item))


def _heartbeat(heartbeat: Heartbeat) -> job_pb2.Heartbeat:
    return job_pb2.Heartbeat(time=timestamp(heartbeat.time), last_sequence=heartbeat.last_sequence)


def _error(error: JobError) -> job_pb2.JobError:
    return job_pb2.JobError(
        type=error.type,
        message=error.message,
        traceback=error.traceback,
        retryable=error.retryable,
    )


def _progress(progress: Progress) -> job_pb2.Progress:
    return job_pb2.Progress(
        current=progress.current, total=progress.total, message=progress.message
    )


def _unique_message(unique: Unique) -> job_pb2.Unique:
    return job_pb2.Unique(
        key=unique.key,
        scope=job_pb2.UniqueScope.Value(f"UNIQUE_SCOPE_{unique.scope}"),
        on_conflict=job_pb2.UniqueConflict.Value(f"UNIQUE_CONFLICT_{unique.on_conflict}"),
    )


def _blob(value: Input) -> job_pb2.Blob:
    return job_pb2.Blob(content_type=value.content_type or "", data=value.data)


# A shared message, which is copied where it is put.


@functools.lru_cache(maxsize=256)
def _policy_message(policy: RetryPolicy) -> job_pb2.RetryPolicy:
    return job_pb2.RetryPolicy(
        initial_backoff=duration(policy.initial_backoff),
        backoff_multiplier=policy.backoff_multiplier,
        max_backoff=duration(policy.max_backoff),
        jitter=policy.jitter,
    )
